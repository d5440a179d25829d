"""What people see of a run or a comparison: lines and bars while it works, and one HTML page of its results.

screen.py      what moves while work goes on, in a terminal or a notebook, with the anatomy of a model in a line
record.py      the content of a run's folder, whether finished, running, stopped or damaged
figures.py     the figures in it that are worth showing, as plain data
advice.py      what to try next
charts.py      the pictures, as data
svg.py         what lies where in each picture; paper.py: the same as SVG and PNG files for papers
page.py        the page of a run; comparison.py: the page of a comparison
template.py    both as HTML, by the files in templates/
"""

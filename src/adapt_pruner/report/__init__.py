"""What people see of a run or a comparison: lines and bars while it works, and one HTML page of what it came to.

screen.py      what moves while work goes on; notebook.py: the same in a notebook; bars.py: the anatomy of a model in a line
record.py      what a run's folder holds, whole, running, stopped or broken off
figures.py     what of it is worth showing, as plain figures
advice.py      what to try next
charts.py      the pictures, as data
svg.py         charts → HTML; paper.py: charts → PNG and SVG for papers, by matplotlib
page.py        the page of a run; comparison.py: the page of a comparison
"""

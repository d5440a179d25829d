"""What a run or a comparison came to, as one HTML page.

record.py      what a run's folder holds, whole, running, stopped or broken off
figures.py     what of it is worth showing, as plain figures
advice.py      what to try next
charts.py      the pictures, as data
svg.py         charts → HTML; paper.py: charts → PNG and SVG for papers, by matplotlib
page.py        the page of a run; comparison.py: the page of a comparison
"""

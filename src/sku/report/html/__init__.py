"""The report of a run as one HTML file that needs nothing beside it: no network, no other file.

::

    side_by_side.py     runs by their key figures, and in what they differ
    result_charts.py    pictures of what was measured, run_charts.py of how it came about
    drawing.py          a figure as a file, and as SVG that follows the page's theme
    page.py             all of it into the templates, and into a file

What a model wrote reaches the page as text nodes alone, from escaped JSON, under a policy that allows no other script
than the page's own.
"""

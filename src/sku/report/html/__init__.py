"""The report of a run as one HTML file that needs nothing beside it: no network, no other file.

::

    run_folder.py       a finished run, read and checked; the parts it need not have are in sweep_file.py,
                        precisions_file.py, task_vector_facts.py, reply_pairs.py
    key_figures.py      what a reader looks at first
    result_charts.py    pictures of what was measured, run_charts.py of how it came about
    drawing.py          a figure as a file, and as SVG that follows the page's theme; palette.py its colours
    reproduction.py     recipe, versions, hashes
    several_runs.py     runs side by side
    page.py             all of it into the templates
    write.py            the file and the folder of plots

What a model wrote reaches the page as text nodes alone, from escaped JSON, under a policy that allows no other script
than the page's own.
"""

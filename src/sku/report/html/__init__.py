"""The report of a run as one HTML file that needs nothing beside it: no network, no other file.

::

    run_folder.py       a finished run, read and checked       sweep_file.py, precisions_file.py  parts that may be there
    key_figures.py      what a reader looks at first           reply_pairs.py  replies of base and unlearned model
    charts.py, ...      figures, drawn by matplotlib           drawing.py      as SVG that follows the page's theme
    reproduction.py     recipe, versions, hashes               several_runs.py runs side by side
    page.py             all of it into the templates           write.py        the file and the folder of plots

What a model wrote reaches the page as text nodes alone, from escaped JSON, under a policy that allows no other script
than the page's own.
"""

"""What the commands do, as functions that the command line and the Python API share.

A workflow joins the three packages: it loads with `marrq`, exports with `exporters` and measures
with `runtime`. It prints nothing and reads no options; marrq/cli does.
"""

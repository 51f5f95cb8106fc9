"""`basicsr doctor`: what is installed, what can run here, and what is wrong with it, to be pasted into a bug report.

The doctor itself needs the standard library alone. What may fail, crash or hang is done by `jobs` in a child process,
which imports parts of esc_arch without the package's own start and so without BasicSR (`bare`); a section that fails is
a line of the report.
"""

"""`basicsr doctor`: what is installed, what can run here, and what is wrong with it, to be pasted into a bug report.

Sections are functions that yield findings. What may fail, crash or hang they call in a child process (`Worker`), in
which `import esc_arch` does not import BasicSR, so that a broken installation is reported as well.
"""

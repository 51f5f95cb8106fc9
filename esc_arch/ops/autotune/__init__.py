"""Try the Triton kernels on the user's own GPU: are they exact there, and faster than what there is?

`auto` takes them where they were. `trial` tries one of them, `runner` all of them in a child process, and `results`
keeps what was found.
"""

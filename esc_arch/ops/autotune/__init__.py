"""Trials of the Triton kernels on the user's own GPU: whether they are exact there, and faster than what there is.

`auto` takes them where their trial says so, see `choice`. `trial` runs one of them; it is called in a process of its
own, because a kernel that fails may end its process or hang. `verdicts` is what it finds, `files` keeps that.
"""

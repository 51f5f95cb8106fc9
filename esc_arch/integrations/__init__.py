"""ESC in the libraries of other programs, a module each, imported only on request."""

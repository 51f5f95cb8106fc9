"""ESC in other programs' libraries, a module each. None is imported unless asked for."""

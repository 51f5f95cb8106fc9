"""Videos: decoded, enlarged frame by frame, and encoded with what else is in the file."""

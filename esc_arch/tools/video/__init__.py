"""Videos: decoded, enlarged picture by picture, and encoded with what else is in the file."""

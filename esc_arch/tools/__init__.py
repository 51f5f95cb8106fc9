"""What training never imports: pictures, videos, export, benchmarks, the doctor. Imported by the command line alone."""

"""Data for BasicSR's pipelines: preparing LMDBs and benchmark folders, and the demo photographs."""

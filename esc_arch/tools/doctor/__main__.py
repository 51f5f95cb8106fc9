"""`python FOLDER/esc_arch/tools/doctor`: the doctor for when `import esc_arch` ends the process.

With `--child` and a search path it is the child process of a `Worker`.
"""

import json
import sys
from pathlib import Path

import subprocess_worker  # this folder is first on the path

_FOLDER = Path(__file__).resolve().parent

if sys.argv[1:2] == ["--child"]:
    sys.path[:] = json.loads(sys.argv[2])
    subprocess_worker.skip_package_imports()
    subprocess_worker.serve()
else:
    sys.path[:] = [*(entry for entry in sys.path if Path(entry).resolve() != _FOLDER), str(_FOLDER.parents[2])]
    failure = subprocess_worker.import_failure("esc_arch")
    if failure:
        subprocess_worker.skip_package_imports()
    from esc_arch.tools.doctor.command import main

    sys.exit(main(sys.argv[1:], failure))

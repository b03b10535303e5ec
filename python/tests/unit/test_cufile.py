"""Where cuFile is looked for, and the program that tries it."""

import subprocess
import sys
from pathlib import Path

from kvrail import cufile


def test_the_chosen_library_stands_alone() -> None:
    assert cufile.libraries({"KVRAIL_CUFILE_LIBRARY": "/x/libcufile.so"}, []) == ["/x/libcufile.so"]


def test_the_system_comes_before_the_wheels(tmp_path: Path) -> None:
    expected = []
    for wheel in ("cu13", "cufile"):
        library = tmp_path / "nvidia" / wheel / "lib" / "libcufile.so.0"
        library.parent.mkdir(parents=True)
        library.touch()
        expected.append(str(library))
    found = cufile.libraries({}, [str(tmp_path), "", str(tmp_path / "missing"), str(tmp_path)])
    assert found == ["libcufile.so.0", "libcufile.so", *expected]


def test_the_program_answers_what_it_does_not_understand() -> None:
    command = cufile.store_options({})["cufile_probe"]
    assert command[0] == sys.executable
    done = subprocess.run(command, input=b"nonsense\0", capture_output=True, check=True, timeout=60)
    assert done.stdout.startswith(b"kvrail-probe: stopped ")

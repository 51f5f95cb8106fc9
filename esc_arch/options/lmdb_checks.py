"""Whether an LMDB has what its list meta_info.txt says: the names, and the sizes of some of its images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from esc_arch.data.lmdb_check import contents_of, lmdb_problem

__all__ = ["check_content"]

Size = tuple[int, int]  # height, width

_IMAGES_DECODED = 16
_AGAIN = "Create it again: basicsr prepare"


def check_content(path: str, folder: str, listed: Mapping[str, Size | None]) -> Iterator[str]:
    """What is wrong with the LMDB `folder`, at `path` in the option file, whose list names `listed`.

    All keys are looked at; of the images, up to 16 from all over the list are decoded.
    """
    import lmdb

    if (problem := lmdb_problem(folder)) is not None:  # reading on could end the process
        yield f"{path}: {folder!r} is damaged: {problem}. {_AGAIN}"
        return
    try:
        found = contents_of(folder, listed, _IMAGES_DECODED)
    except lmdb.Error as error:
        yield f"{path}: {folder!r} cannot be read: {error}. {_AGAIN}"
        return
    if found.missing:
        yield (
            f"{path}: {len(found.missing)} of the {len(listed)} images that {folder!r} lists in meta_info.txt are "
            f"missing, the first is {found.missing[0]!r}. {_AGAIN}"
        )
    if found.unlisted:
        yield (
            f"{path}: {len(found.unlisted)} of the {found.keys} images in {folder!r} are not in its meta_info.txt, "
            f"the first is {found.unlisted[0]!r}. {_AGAIN}"
        )
    for key, problem in found.bad.items():
        yield f"{path}: {key!r} in {folder!r} {problem}. {_AGAIN}"

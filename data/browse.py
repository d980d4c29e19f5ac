"""Looking into a prepared version without reading all of its pictures.

In: a version. Out: what its rows say without their pictures, as a pandas frame; and the pictures of the rows that are
named, for which only the row groups that hold them are read. For reports and the dashboard, which show a few.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import pyarrow.parquet as pq

from data.errors import explained
from data.versions import SPLITS, DataVersion

if TYPE_CHECKING:
    import pandas as pd


def rows(version: DataVersion, splits: Sequence[str] = SPLITS) -> pd.DataFrame:
    """Every row of the splits, all columns but ``image``."""
    import pandas as pd

    columns = [name for name in version.schema.names if name != "image"]
    frames = [version.table(split, columns).to_pandas() for split in splits]
    filled = [frame for frame in frames if len(frame)]
    return pd.concat(filled, ignore_index=True) if filled else frames[0]


def pictures(version: DataVersion, ids: Iterable[str], splits: Sequence[str] = SPLITS) -> dict[str, bytes]:
    """The original bytes of the rows with these ids; ids that are in none of the splits are left out."""
    missing, found = set(ids), dict[str, bytes]()
    for path in (path for split in splits for path in version.files(split)):
        if not missing:
            break
        with (
            explained(str(version.location)),
            version.location.arrow_filesystem.open_input_file(path) as opened,
            pq.ParquetFile(opened) as file,
        ):
            first = 0
            names = file.read(["id"]).column("id").to_pylist()
            for group in range(file.num_row_groups):
                held = names[first : first + file.metadata.row_group(group).num_rows]
                first += len(held)
                wanted = [place for place, name in enumerate(held) if name in missing]
                if wanted:
                    images = file.read_row_group(group, ["image"]).column("image")
                    found |= {held[place]: images[place].as_py() for place in wanted}
                    missing -= {held[place] for place in wanted}
    return found

"""The data dashboard: what is in prepared versions, in a browser.

    make data-dashboard DATA=FOLDER        (python -m data.dashboard --data FOLDER)

In: folders or S3 prefixes below which ``NAME/VERSION`` lie. Out: a Streamlit page: data set, version and split;
records, columns and missing values; label, source and generator bars; random samples; rejects with reasons;
near-duplicate groups side by side; two versions compared. It listens on loopback, opens no browser and sends no usage
statistics.

Reads, never writes. Only the row groups of pictures that are shown are read. Knows no model.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from data.commands import parse
from data.errors import DataError, end
from data.locations import Location
from data.versions import SPLITS, DatasetName, DataVersion, open_version, versions

if TYPE_CHECKING:
    import pandas as pd

#: How `main` hands its folders to the page, which Streamlit runs as a script of its own.
_PLACES = "DEEPTRUST_DATA_PLACES"
_NAMES: tuple[DatasetName, ...] = ("aivshuman", "flickr30k", "source")
_ALL = "all splits"
_COLUMNS = 4


class DashboardConfig(BaseModel):
    """Where versions lie, and where the page is."""

    model_config = ConfigDict(extra="forbid")

    data: list[str] = Field(description="folder or s3://bucket/prefix with NAME/VERSION in it; may be repeated")
    host: str = Field("127.0.0.1", description="address that it listens on; it asks nobody who they are")
    port: int = Field(8501, ge=1, le=65535)


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve the page until Ctrl-C."""
    config = parse(DashboardConfig, arguments)
    try:
        places = [Location.of(place) for place in config.data]
        if not any(find_versions([str(place)]) for place in places):
            raise DataError(
                f"no prepared data set below {', '.join(map(str, places))}: make one with `python -m data.prepare`, or "
                "name its --output as --data"
            )
    except Exception as error:
        end(error)
    options = {
        "server.address": config.host,
        "server.port": config.port,
        "server.headless": "true",
        "server.fileWatcherType": "none",
        "browser.gatherUsageStats": "false",
        "client.toolbarMode": "minimal",
    }
    root = Path(__file__).parent.parent
    environment = os.environ | {
        _PLACES: "\n".join(map(str, places)),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH", "")))),
    }
    command = [sys.executable, "-m", "streamlit", "run", str(Path(__file__).resolve())]
    command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
    print(f"data dashboard: http://{config.host}:{config.port} (Ctrl-C ends it)", flush=True)
    # in place of this process: whoever stops it stops the page
    os.execve(sys.executable, command, environment)


def find_versions(places: Sequence[str]) -> dict[str, list[DataVersion]]:
    """Data set -> its versions, the newest first; a place may be of a version, of a data set, or of several."""
    found: dict[str, dict[str, DataVersion]] = {}
    for text in places:
        place = Location.of(text)
        for candidate in (place, *(place / name for name in _NAMES)):
            for version in versions(candidate):
                found.setdefault(version.manifest.name, {})[str(version.location)] = version
        if (place / "manifest.json").exists():
            version = open_version(place)
            found.setdefault(version.manifest.name, {})[str(version.location)] = version
    return {
        name: sorted(own.values(), key=lambda version: version.manifest.created_at, reverse=True)
        for name, own in sorted(found.items())
    }


# --------------------------------------------------------------------------------------------------------------- page


def page() -> None:
    """The whole page; Streamlit runs it again for every change of a choice."""
    import streamlit as st

    st.set_page_config("DeepTrust data", layout="wide")
    try:
        found = find_versions(os.environ[_PLACES].split("\n"))
    except DataError as error:
        st.error(str(error))
        return
    with st.sidebar:
        st.title("DeepTrust data")
        if not found:
            st.info("There is no prepared version left: make one with `python -m data.prepare`.")
            return
        name = st.selectbox("Data set", list(found), key="dataset")
        own = {_title(version): version for version in found[name]}
        version = own[st.selectbox("Version", list(own), key=f"version-{name}")]
        split = st.selectbox("Split", [*SPLITS, _ALL], key="split")
    try:
        everything = load(str(version.location))
    except DataError as error:
        st.error(str(error))
        return
    frame = everything if split == _ALL else everything[everything["split"] == split]
    st.header(f"{name} {version.manifest.version}, {split}")
    _tiles(version, frame)
    tabs = st.tabs(["Records", "Balance", "Samples", "Rejects", "Near-duplicates", "Compare", "Manifest"])
    shown: tuple[Callable[..., None], ...] = (_records, _balance, _samples, _rejects, _duplicates, _compare, _manifest)
    for tab, show in zip(tabs, shown, strict=True):
        with tab:
            if show is _compare:
                _compare(version, everything, found[name])
            elif len(frame) or show in (_rejects, _manifest):
                show(version, frame)
            else:
                st.info(f"There is no picture in {split} of this version.")


def _title(version: DataVersion) -> str:
    return f"{version.manifest.version}, {version.manifest.created_at[:16].replace('T', ' ')}"


def load(place: str) -> pd.DataFrame:
    """Every row of a version without its picture, kept for the sessions to come: a version never changes."""
    import streamlit as st

    @st.cache_data(max_entries=4, show_spinner="reading the version")
    def rows_of(place: str) -> pd.DataFrame:
        from data.browse import rows

        return rows(open_version(place))

    return rows_of(place)


def _tiles(version: DataVersion, frame: pd.DataFrame) -> None:
    import streamlit as st

    from data.pages import number, size

    figures = {
        "Pictures": number(len(frame)),
        "Size": size(float(frame["bytes"].sum())),
        "Groups": number(int(frame["group"].nunique())),
        "Rejects": number(sum(version.manifest.rejects.values())),
        "Rules that hold": f"{sum(c.passed for c in version.manifest.checks.values())}/{len(version.manifest.checks)}",
    }
    if "captions" in frame:
        figures["Captions"] = number(int(frame["captions"].map(len).sum()))
    for column, (text, value) in zip(st.columns(len(figures)), figures.items(), strict=True):
        column.metric(text, value)


def _records(version: DataVersion, frame: pd.DataFrame) -> None:
    import pandas as pd
    import streamlit as st

    fields = {field.name: field for field in version.schema}
    st.subheader("Columns")
    columns = pd.DataFrame(
        {
            "column": list(frame.columns),
            "type": [str(fields[name].type) for name in frame.columns],
            "missing": [int(frame[name].isna().sum()) for name in frame.columns],
            "different": [int(frame[name].map(str).nunique()) for name in frame.columns],
            "example": [str(frame[name].iloc[0])[:80] for name in frame.columns],
        }
    )
    st.dataframe(columns, hide_index=True, width="stretch")
    st.subheader("Records")
    text = st.text_input("File name or id contains", key="filter")
    kept = frame
    if text:
        kept = frame[
            frame["file_name"].str.contains(text, case=False, regex=False)
            | frame["id"].str.contains(text, case=False, regex=False)
        ]
    st.caption(f"{len(kept):,} of {len(frame):,} records" + (", the first 1,000 shown" if len(kept) > 1000 else ""))
    st.dataframe(kept.head(1000), hide_index=True, width="stretch")


def _balance(version: DataVersion, frame: pd.DataFrame) -> None:
    import streamlit as st

    names = ["label"] if "label" in frame else []
    for name in [*names, "generator", "source", "format"]:
        st.subheader({"label": "Labels", "generator": "Generators", "source": "Sources", "format": "Formats"}[name])
        _bars(frame, name)
    if "captions" in frame:
        st.subheader("Length of captions, words")
        lengths = frame["captions"].explode().dropna().map(lambda text: len(text.split()))
        st.bar_chart(lengths.value_counts().sort_index(), x_label="words", y_label="captions")


def _bars(frame: pd.DataFrame, name: str) -> None:
    """Bars of a column's values, by label where there are labels."""
    import streamlit as st

    values = frame[name].fillna("unknown")
    if "label" in frame:
        counts = frame.groupby([values, frame["label"].rename("_label")]).size().unstack(fill_value=0)
        # teal is human on every page of this project, purple is AI
        colours: list[Any] = [
            {"human": "#14877a", "stock": "#14877a"}.get(label, "#9c3aa8") for label in counts.columns
        ]
        st.bar_chart(counts, horizontal=True, color=colours, x_label=name, y_label="pictures")
    else:
        st.bar_chart(values.value_counts(), horizontal=True, color="#14877a", x_label=name, y_label="pictures")


def _samples(version: DataVersion, frame: pd.DataFrame) -> None:
    import streamlit as st

    first, second, third = st.columns([2, 2, 1], vertical_alignment="bottom")
    kept = frame
    if "label" in frame:
        label = first.selectbox("Label", ["any", *sorted(frame["label"].unique())], key="sample-label")
        kept = kept if label == "any" else kept[kept["label"] == label]
    origins = frame["generator"].fillna("unknown")
    generator = second.selectbox("Generator", ["any", *sorted(origins.unique())], key="sample-generator")
    kept = kept if generator == "any" else kept[origins.loc[kept.index] == generator]
    state = st.session_state
    state.setdefault("seed", 0)
    if third.button("Other ones", key="again"):
        state["seed"] += 1
    if not len(kept):
        st.info("No picture has both.")
        return
    _show(version, kept.sample(min(len(kept), 12), random_state=state["seed"]))


def _show(version: DataVersion, chosen: pd.DataFrame, columns: int = _COLUMNS) -> None:
    """Pictures with what is known of them."""
    import streamlit as st

    from data.browse import pictures
    from data.pages import thumbnail

    found = pictures(version, chosen["id"], list(dict.fromkeys(chosen["split"])))
    places = st.columns(columns)
    for place, row in enumerate(chosen.to_dict("records")):
        with places[place % columns]:
            small = thumbnail(found[row["id"]], 400)
            if small is None:
                st.warning("not readable")
            else:
                st.image(small, width="stretch")
            known = [row["label"]] if "label" in row else []
            known += [row["generator"]] if isinstance(row["generator"], str) and row["generator"] != "photo" else []
            if known:
                st.text(", ".join(known))
            for text in row.get("raw_captions", []):
                st.text(f"“{text}”")
            kind = (
                row["format"]
                if row["jpeg_quality"] != row["jpeg_quality"]
                else f"{row['format']} q{row['jpeg_quality']:.0f}"
            )
            st.caption(
                _plain(f"{row['file_name']}, {row['width']} x {row['height']}, {kind}, {row['source']}, {row['split']}")
            )


def _plain(text: str) -> str:
    """Text of the data in a place that takes Markdown."""
    return "".join(f"\\{letter}" if letter in "\\`*_{}[]()<>#+-.!|$~:" else letter for letter in text)


def _rejects(version: DataVersion, frame: pd.DataFrame) -> None:
    import streamlit as st

    rejects = version.table("rejects").to_pandas()
    if not len(rejects):
        st.info("Nothing was rejected.")
        return
    st.bar_chart(rejects["reason"].value_counts(), horizontal=True, color="#b23a48", x_label="reason", y_label="rows")
    reason = st.selectbox("Reason", ["any", *sorted(rejects["reason"].unique())], key="reason")
    st.dataframe(rejects if reason == "any" else rejects[rejects["reason"] == reason], hide_index=True, width="stretch")


def _duplicates(version: DataVersion, frame: pd.DataFrame) -> None:
    import streamlit as st

    sizes = frame["group"].value_counts()
    sizes = sizes[sizes > 1].sort_index().sort_values(ascending=False, kind="stable")
    if not len(sizes):
        st.info("No two pictures of this split are near-duplicates, twins or the same photo.")
        return
    pages = -(-len(sizes) // 5)
    number = st.number_input(f"Page (of {pages})", 1, pages, key="group-page") if pages > 1 else 1
    st.caption(f"{len(sizes):,} groups of more than one picture: near-duplicates, a photo and its generated twin")
    for name in sizes.index[5 * (number - 1) : 5 * number]:
        st.markdown(f"**{sizes[name]} pictures**, group `{name[:12]}`")
        _show(version, frame[frame["group"] == name].sort_values("id").head(8))
        st.divider()


def _compare(version: DataVersion, frame: pd.DataFrame, others: Sequence[DataVersion]) -> None:
    import pandas as pd
    import streamlit as st

    choices = {_title(other): other for other in others if other.location != version.location}
    if not choices:
        st.info("There is only one version of this data set.")
        return
    other = choices[st.selectbox("Compare with", list(choices), key="other")]
    theirs = load(str(other.location))
    here, there = version.manifest.version, other.manifest.version
    own, foreign = frame.set_index("id"), theirs.set_index("id")
    both = own.index.intersection(foreign.index)
    moved = own.loc[both, "split"] != foreign.loc[both, "split"]
    counted = {
        f"only in {here}": len(own.index.difference(foreign.index)),
        f"only in {there}": len(foreign.index.difference(own.index)),
        "in both": len(both),
        "in another split": int(moved.sum()),
    }
    if "label" in frame:
        counted["with another label"] = int((own.loc[both, "label"] != foreign.loc[both, "label"]).sum())
    for column, (text, value) in zip(st.columns(len(counted)), counted.items(), strict=True):
        column.metric(text, f"{value:,}")
    leaked = own.loc[both][moved & (foreign.loc[both, "split"] == "train") & (own.loc[both, "split"] != "train")]
    if len(leaked):
        st.warning(
            f"{len(leaked):,} pictures that {here} holds out are in training in {there}: a model trained on {there} "
            f"must not be judged with {here}."
        )
    names = ["split", *(["label"] if "label" in frame else []), "source", "generator", "format"]
    for name in names:
        st.subheader(name.capitalize())
        counts = pd.DataFrame(
            {
                here: frame[name].fillna("unknown").value_counts(),
                there: theirs[name].fillna("unknown").value_counts(),
            }
        )
        counts = counts.fillna(0).astype(int)
        counts["change"] = counts[here] - counts[there]
        st.dataframe(counts, width="stretch")
    st.subheader("Settings that differ")
    settings = {
        name: (str(version.manifest.settings.get(name)), str(other.manifest.settings.get(name)))
        for name in sorted({*version.manifest.settings, *other.manifest.settings})
        if version.manifest.settings.get(name) != other.manifest.settings.get(name)
    }
    if settings:
        st.table(pd.DataFrame.from_dict(settings, orient="index", columns=[here, there]))
    else:
        st.caption("none")


def _manifest(version: DataVersion, frame: pd.DataFrame) -> None:
    import streamlit as st

    st.caption(_plain(str(version.location)))
    for name, check in version.manifest.checks.items():
        (st.success if check.passed else st.error)(_plain(f"{name.replace('_', ' ')}: {check.detail}"))
    st.json(version.manifest.model_dump(mode="json", exclude={"files"}), expanded=1)


def _in_streamlit() -> bool:
    """Whether Streamlit runs this file as its page."""
    if "streamlit" not in sys.modules:
        return False
    from streamlit.runtime.scriptrunner import get_script_run_ctx

    return get_script_run_ctx(suppress_warning=True) is not None


if __name__ == "__main__":
    if _in_streamlit():
        page()
    else:
        main()

"""Raw data sets fetched from Kaggle. In: the name of a data set. Out: the local folder that kagglehub put it in. Knows
no layout.
"""

from __future__ import annotations

from pathlib import Path

from data.errors import DataError
from data.versions import DatasetName

_HANDLES: dict[DatasetName, str] = {
    "aivshuman": "alessandrasala79/ai-vs-human-generated-dataset",
    "flickr30k": "adityajn105/flickr30k",
}


def download(name: DatasetName) -> Path:
    """Fetch a data set, or find it in kagglehub's cache.

    Raises:
        DataError: no credentials, or Kaggle refuses or does not answer.
    """
    import kagglehub
    from kagglehub.config import get_kaggle_credentials

    handle = _HANDLES[name]
    if get_kaggle_credentials() is None:
        raise DataError(
            f"no Kaggle credentials to fetch {handle}: set KAGGLE_USERNAME and KAGGLE_KEY or put kaggle.json into "
            "~/.kaggle, or fetch it by hand and give it as --input"
        )
    try:
        return Path(kagglehub.dataset_download(handle))
    except Exception as error:  # kagglehub raises what its HTTP client, archive reader and file system raise
        raise DataError(
            f"Kaggle did not deliver {handle} ({type(error).__name__}: {error}): check the network, the "
            "credentials and the data set's terms, or fetch it by hand and give it as --input"
        ) from error

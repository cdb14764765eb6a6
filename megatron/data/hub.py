"""Files of data sets on the Hugging Face Hub: where one lies, what its bytes must be, and the token that opens it.

huggingface_hub knows addresses (HF_ENDPOINT for a mirror), tokens (`hf auth login`, HF_TOKEN), checksums and whether
the network may be used (HF_HUB_OFFLINE). The bytes come by `megatron.data.download`: the library's own download throws
away what came before an interruption, and these files take hours.
"""

from __future__ import annotations

import re
from pathlib import Path

from megatron.data.download import Patience, download
from megatron.errors import UserError

HUB = "hf://datasets/"


def download_from_hub(
    address: str, path: Path, force: bool = False, patience: Patience | None = None, flag: str = "--input"
) -> Path:
    """Fetch `hf://datasets/OWNER/NAME/FILE` to `path`, as `download` does, with the checksum that the Hub announces.

    Raises UserError for a file that is not there, may not be read, or does not arrive whole.
    """
    if path.is_file() and not force:
        return path
    from huggingface_hub import get_hf_file_metadata, get_token, hf_hub_url
    from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

    owner, name, file = address.removeprefix(HUB).split("/", 2)
    url, token = hf_hub_url(f"{owner}/{name}", file, repo_type="dataset"), get_token()
    try:
        metadata = get_hf_file_metadata(url, token=token, retry_on_errors=True)
    except OfflineModeIsEnabled:
        raise UserError(f"{url}: HF_HUB_OFFLINE is set; unset it, or pass the files with {flag}") from None
    except (GatedRepoError, RepositoryNotFoundError) as error:
        raise UserError(f"{url}: {owner}/{name} is not open to everybody; log in with `hf auth login`") from error
    except Exception as error:  # the library's errors and those of its HTTP client have nothing else in common
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{url}: {reason}; check the network, or pass the files with {flag}") from error
    # Of a file in git itself, and not in its large file storage, the Hub announces git's own kind of checksum.
    checksum = f"sha256:{metadata.etag}" if re.fullmatch("[0-9a-f]{64}", metadata.etag or "") else None
    return download(url, path, checksum, force, patience, token, flag)

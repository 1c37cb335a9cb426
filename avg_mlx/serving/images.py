"""From the images that a request names to crops: where they may come from, and how large they may be."""

import asyncio
import urllib.parse
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

from ..config import Config
from ..errors import InputError, printable
from ..files import read_file, too_large
from ..inputs.image import Crops, make_crops
from ..inputs.image_io import read_image
from .conversation import NamedImage
from .problems import Problem, as_problem
from .url_images import UrlImages

REMEDY = "send the image as a data URI"


@dataclass(frozen=True)
class ImageReader:
    """Reads and cuts images in worker threads.

    max_bytes: of an encoded image. max_pixels: of a decoded one. media_path: the folder whose files may be named; none
    if it is None. urls: fetches addresses; none may be named if it is None.
    """

    config: Config
    workers: Executor
    max_bytes: int
    max_pixels: int
    media_path: Path | None = None
    urls: UrlImages | None = None

    async def read(self, images: Sequence[NamedImage], hold: Callable[[int], None]) -> tuple[Crops, ...]:
        """Return the crops of each image, whose bytes `hold` counts before the next one is read.

        Raises Problem, with the field's name, for an image that cannot be used, and what `hold` raises.
        """
        crops = []
        for image in images:
            crops.append(await self._read(image))
            hold(crops[-1].pixels.nbytes)
        return tuple(crops)

    async def _read(self, image: NamedImage) -> Crops:
        try:
            source = await self._source(image.source)
            return await asyncio.get_running_loop().run_in_executor(self.workers, self._cut, source)
        except (Problem, InputError) as error:
            raise as_problem(error).about(image.path) from None

    async def _source(self, source: str) -> str | bytes:
        """Return an image's bytes, or the data URI that holds them."""
        scheme = source.partition(":")[0].lower()
        if scheme == "data":
            if (size := len(source) * 3 // 4) > self.max_bytes:
                raise InputError(too_large("the image", size, self.max_bytes, "make it smaller"))
            return source
        if scheme in ("http", "https"):
            if self.urls is None:
                raise InputError(f"images are not fetched from addresses here; {REMEDY}")
            return await self.urls.fetch(source)
        if scheme == "file":
            return await asyncio.get_running_loop().run_in_executor(self.workers, self._file, source)
        raise InputError(f"{printable(source, 40)} is neither a data URI nor an address; {REMEDY}")

    def _file(self, uri: str) -> bytes:
        """Read a file of the media folder. Whether there are others is not told."""
        if self.media_path is None:
            raise InputError(f"files of the server are not read here; {REMEDY}")
        name, folder = printable(uri, 200), self.media_path.resolve()
        try:
            parts = urllib.parse.urlsplit(uri)
            path = Path(urllib.parse.unquote(parts.path)).resolve()
            if parts.netloc not in ("", "localhost") or not path.is_relative_to(folder):
                raise InputError(f"{name} is outside of the server's media folder; {REMEDY}")
            return read_file(path, "give an image file", self.max_bytes)
        except FileNotFoundError:
            raise InputError(f"there is no {name}; check the address") from None
        except (OSError, RuntimeError) as error:  # a loop of links, a name that is too long
            raise InputError(f"{name} cannot be read ({printable(error, 80)}); check the address") from None
        except ValueError as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{name} is not a file's address; write file:///…") from None

    def _cut(self, source: str | bytes) -> Crops:
        return make_crops(read_image(source, self.max_pixels), self.config)

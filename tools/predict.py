"""Predict pictures, videos and streams: ``python tools/predict.py checkpoint=PATH images=PATH``."""

import math
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

if not __package__:  # started as a file of a checkout: the checkout is what is meant
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from danet.interpreter import require_packages

    require_packages(__file__)

import numpy as np
from omegaconf import DictConfig, OmegaConf
from torch import nn
from tqdm import tqdm

from danet import cli
from danet.config.build import checked_config, choose_inference, load_saved, model_of
from danet.config.schema import PredictConfig, did_you_mean
from danet.data_check.report import picture_notes
from danet.datasets.image_io import Levels
from danet.distributed.rendezvous import choose_device
from danet.errors import InputError
from danet.evaluation.evaluate import Inference
from danet.evaluation.fuse import fuse_for_inference
from danet.extras import how_to_install
from danet.filesystem import folder_of, write_table
from danet.prediction.annotations import write_annotations
from danet.prediction.predict import MAPS, Prediction, predictions
from danet.prediction.raster import TIFF_SUFFIXES, is_raster, predict_raster
from danet.prediction.results import KINDS, POLYGONS, Results, weights_digest
from danet.prediction.sources import (
    Picture,
    Source,
    count_frames,
    find_sources,
    prefetch,
    read_pictures,
)
from danet.prediction.streams import Live, find_stream, piped_pictures
from danet.visualization.overlay import Legend

_MAX_LISTED = 3
"""Number of unreadable and of least sure files that the last messages name."""


def run(config: DictConfig) -> None:
    """Load the network, predict the pictures, and write the results."""
    settings: PredictConfig = OmegaConf.to_object(config)  # type: ignore[assignment]
    refuse_settings(settings)
    stream = find_stream(settings.images, getattr(sys.stdin, "buffer", None))
    lines = (sys.stdin or ()) if settings.images == "-" else ()
    sources = [stream] if stream else find_sources(settings.images, lines)
    polygons = [kind for kind in POLYGONS if kind in settings.write]
    refuse_sources(settings, sources)
    saved = load_saved(settings.checkpoint)
    trained = checked_config(saved, settings.checkpoint)
    protocol, infer = choose_inference(settings.evaluation, trained)
    model: Any = model_of(saved, trained, settings.checkpoint)
    device = choose_device(settings.device)
    origin: dict[str, Any] = {"network": weights_digest(model), "evaluation": protocol}
    origin |= {"temperature": model.temperature, "min_confidence": settings.min_confidence}
    origin |= {"maps": settings.maps, "images": settings.images}
    if stream:
        origin |= {"images": stream.version["source"], "started": stream.version["started"]}
    elif settings.images != "-":
        origin["images"] = str(Path(settings.images).expanduser().absolute())
    output = folder_for(settings, origin, stream)
    palette = [tuple(color) for color in saved["palette"]]
    bands: Any = model.bands
    if bands and stream and stream.is_live:
        raise InputError(f"{stream.name}: a video is RGB; this network reads other bands")
    if not polygons:  # these are of the pixels of a picture, not of a place
        sources = [
            s._replace(is_raster=is_raster(s.path, settings.max_pixels, bands)) for s in sources
        ]
    maps = [kind for kind in MAPS if kind in settings.write]
    rasters = [source.path for source in sources if source.is_raster]
    if rasters and maps:
        raise InputError(
            f"write=[{','.join(settings.write)}]: {rasters[0]} is done in windows, of which no "
            f"{maps[0]} is written; leave {' and '.join(maps)} out, or that file"
        )
    legend = Legend(saved["classes"], palette, settings.opacity, bands)
    results = Results(output, settings.write, origin=origin, legend=legend)
    fused = fuse_for_inference(model.to(device), device)

    start = time.perf_counter()
    wanted, batch_size = sorted({"confidence", *maps}), settings.batch_size
    try:
        with results, PictureReader(sources, results, settings, bands) as pictures:
            for found in predictions(fused, pictures, infer, wanted, batch_size=batch_size):
                results.write(pictures.waiting.popleft(), found)
                pictures.bar.update()
                del found  # large; not held while the next are read
            pictures.predict_rasters(fused, infer, results, batch_size)
    except KeyboardInterrupt:
        if not stream:  # which cannot be read again
            print("the same command again does the rest", file=sys.stderr)
        raise
    seconds = time.perf_counter() - start
    write_annotations(results, sources, polygons, settings.tolerance)
    problems, live = pictures.problems, pictures.live
    count = live.taken if live else len(pictures.read)
    earlier = f", {pictures.skipped} were there already" if pictures.skipped else ""
    print(
        f"{count} images in {seconds:.1f} s, {count / seconds:.2f} images/s{earlier}; "
        f"written to {output}"
    )
    list_least_sure(results)
    if live and live.delays:
        pace = (live.number - 1) / max(live.seconds, 1e-3)
        print(
            f"{live.number} frames came, {pace:.1f} frames/s; {live.number - count} were dropped; "
            f"results {median(live.delays):.2f} s after their frames (median)"
        )
    is_tiff = any(source.path.suffix.lower() in TIFF_SUFFIXES for source in sources)
    if is_tiff and find_spec("rasterio") is None:
        print(
            "note: where rasterio is installed, GeoTIFFs keep their georeference and may be larger "
            f"than max_pixels: {how_to_install('geo')}",
            file=sys.stderr,
        )
    for note in picture_notes(pictures.read):
        print(note, file=sys.stderr)
    if count > 1 and len(results.found) == 1:
        print(
            f"warning: every pixel of these {count} images was predicted as class "
            f"{results.found.pop()}",
            file=sys.stderr,
        )
    if problems and live:
        raise InputError(problems[0])
    if problems:
        number, problems = len(problems), [*dict.fromkeys(problems)]
        more = len(problems) - _MAX_LISTED
        total = count + number if stream else len(sources)
        raise InputError(
            f"{number} of {total} files could not be read whole, the others are done:\n"
            + "\n".join(problems[:_MAX_LISTED])
            + (f"\nand {more} more" if more > 0 else "")
        )


class PictureReader:
    """Iterates over the images without results, then predicts rasters, and counts all others.

    It is a context, with a progress bar.
    """

    def __init__(
        self, sources: Sequence[Source], results: Results, settings: PredictConfig, bands: Any
    ) -> None:
        # Of all at once, so that nothing is predicted where one is refused.
        done = [(source, results.find_done(source)) for source in sources]
        self._rasters = [s for s, names in done if s.is_raster and s.name not in names]
        others: Any = ((s, names) for s, names in done if not s.is_raster or s.name in names)
        if sources[0].address == "-":
            others = piped_pictures(sources[0], sys.stdin.buffer)  # type: ignore[arg-type]
        self.live = Live(sources[0], settings.frames) if sources[0].is_live else None
        """A camera or a stream; it is not read ahead, since that would make its frames late."""
        self._items = read_pictures(others, max_pixels=settings.max_pixels, bands=bands)
        known = sum(count_frames(s.path) if s.is_video else 1 for s in sources if not s.address)
        total = known or settings.frames
        self.bar = tqdm(total=total, desc="predict", unit="image", dynamic_ncols=True)
        self.waiting: deque[Picture] = deque()
        """Those whose images were yielded; the caller takes them out."""
        self.skipped = 0
        self.problems: list[str] = []
        """Why files could not be read."""
        self.read: list[tuple[str, tuple[str, ...], Levels | None]] = []
        """Name of each picture, what its reader dropped, and its levels."""

    def __enter__(self) -> "PictureReader":
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.close()

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield images, which are read ahead while the network runs."""
        for item in self.live or prefetch(self._items):
            if isinstance(item, Picture):
                if self.live:  # of its frames no list is kept, since they may have no end
                    dropped = self.live.number - self.live.taken
                    self.bar.set_postfix_str(f"{dropped} dropped", refresh=False)
                else:
                    self.read.append((item.name, item.dropped, item.levels))
                self.waiting.append(item)
                yield item.image
                del item
                continue
            self.bar.update()
            if item is None:
                self.skipped += 1
            else:
                self._report(item)

    def predict_rasters(
        self, model: nn.Module, infer: Inference, results: Results, batch_size: int
    ) -> None:
        """Predict and write the rasters without results, one after another."""
        for source in self._rasters:
            to = results.paths(source.name, source)["index"]
            try:
                picture, classes = predict_raster(
                    model,
                    source,
                    infer,
                    to,
                    results.legend,
                    min_confidence=results.min_confidence,
                    batch_size=batch_size,
                )
            except InputError as error:
                self._report(error)
            else:
                results.write(picture, Prediction(classes))
                self.read.append((source.name, picture.dropped, None))
            self.bar.update()

    def _report(self, problem: InputError) -> None:
        text = str(problem).replace("data.max_pixels", "max_pixels")
        if text not in self.problems and not self.live:  # such as of a package that all files need
            self.bar.write(f"warning: {text}", file=sys.stderr)
        self.problems.append(text)


def list_least_sure(results: Results) -> None:
    """Write all pictures of a folder, the least sure first, to least_sure.csv; print the first."""
    keys = ("confidence", "unknown", "name", "source")
    # Lines of earlier versions have no confidence, and those of rasters without data have null.
    known = [line for line in results.lines.values() if line.get("confidence") is not None]
    lines = sorted(tuple(line[key] for key in keys) for line in known)
    rows = [(name, src, round(sure, 6), round(unknown, 6)) for sure, unknown, name, src in lines]
    path = results.folder / "least_sure.csv"
    if lines:  # none of a camera are kept
        write_table(path, [("name", "source", "confidence", "unknown"), *rows])
    if len(lines) > 1:
        first = (f"{name} {confidence:.3f}" for confidence, _, name, _ in lines[:_MAX_LISTED])
        print(f"least sure: {', '.join(first)}; all in {path}")


def refuse_sources(settings: PredictConfig, sources: Sequence[Source]) -> None:
    """Raise InputError for settings that do not fit what is to be predicted."""
    videos = [s.name if s.address else s.path for s in sources if s.is_video or s.address]
    if videos and set(POLYGONS) & set(settings.write):
        raise InputError(
            f"write=[{','.join(settings.write)}]: annotation tools read pictures, and {videos[0]} "
            f"is {'no file' if sources[0].address else 'a video'}; save its frames as pictures, or "
            "leave it out"
        )
    is_live, name = sources[0].is_live, sources[0].name
    if is_live and settings.batch_size != 1:
        raise InputError(
            f"batch_size={settings.batch_size}: {name} is live, and its frames do not wait for one "
            "another; expected 1"
        )
    if settings.frames and not is_live:
        raise InputError(
            f"frames={settings.frames}: {name} is no camera and no live stream, of which frames "
            "are counted; leave it out"
        )


def refuse_settings(settings: PredictConfig) -> None:
    """Raise InputError for settings that are out of range."""
    for kind in settings.write:
        if kind not in KINDS:
            raise InputError(
                f"write: there is no {kind}{did_you_mean(kind, KINDS)}; expected some of "
                f"{', '.join(KINDS)}, or [] for class shares alone"
            )
    for name in ("batch_size", "max_pixels", "frames"):
        if getattr(settings, name) is not None and getattr(settings, name) < 1:
            raise InputError(f"{name}={getattr(settings, name)}: expected at least 1")
    if not 0 <= settings.tolerance < math.inf:
        raise InputError(f"tolerance={settings.tolerance}: expected at least 0, and finite")
    if not 0 <= settings.min_confidence <= 1:
        raise InputError(f"min_confidence={settings.min_confidence}: expected 0 to 1")
    if settings.maps not in ("uint8", "uint16", "npy"):
        raise InputError(f"maps={settings.maps}: expected one of uint8, uint16, npy")
    if not 0 <= settings.opacity <= 1:
        raise InputError(f"opacity={settings.opacity}: expected 0 to 1")


def folder_for(
    settings: PredictConfig, origin: Mapping[str, Any], stream: Source | None = None
) -> Path:
    """Return the folder of the results, by default one for this network and these pictures alone.

    Raises:
        InputError: Results there would be taken for pictures at the next start.
    """
    beside = Path(settings.checkpoint).expanduser()
    beside = beside if beside.is_dir() else beside.parent
    name = "list" if settings.images == "-" else Path(settings.images).expanduser().stem
    name = stream.name if stream else name
    plain = "".join(letter for letter in name if letter not in "*?[]") or "pictures"
    if settings.output:
        output = Path(settings.output).expanduser()
    else:
        output = folder_of(beside / f"predict_{plain}", Results.ORIGIN, origin)
    source = Path(settings.images).expanduser()
    if source.is_dir() and output.absolute().is_relative_to(source.absolute()):
        raise InputError(
            f"output={output} lies in images={source}, so the next start would take results for "
            "pictures: name a folder elsewhere"
        )
    return output


def main() -> None:
    """Run the command ``danet-predict``."""
    cli.run(run, "predict")


if __name__ == "__main__":
    main()

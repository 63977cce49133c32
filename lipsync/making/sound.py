"""A source's sound, looked at: the recording, the audio features, and where the person is silent."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from lipsync.engine.arrays import check_finite, front_end_of, open_array, to_float32
from lipsync.engine.audio import (
    FRONT_ENDS,
    SAMPLE_RATE_HZ,
    VIDEO_FPS,
    AudioEncoder,
    AudioFrontEnd,
    audio_features,
    read_audio,
)
from lipsync.engine.faults import Fault, printable
from lipsync.engine.idle import MIN_QUIET_S, idle_ranges, seconds
from lipsync.engine.manifest import Ranges
from lipsync.engine.package import MAX_FEATURE_ROWS_OFF
from lipsync.engine.unet import UNet
from lipsync.errors import MediaError
from lipsync.making.findings import Report
from lipsync.making.pictures import Progress
from lipsync.making.source import Source, SourceOptions

Float32 = npt.NDArray[np.float32]
Int16 = npt.NDArray[np.int16]

MAX_ROWS_CUT_S = 1.0
MAX_ROWS_CUT_PART = 0.02
"""Feature rows and frames may differ by the larger of the two; more, and they do not belong together."""
DURATION_OFF_S = 0.3
"""A recording and its video are rarely of one length to the frame."""
OTHER_RATES = (15, 20, 24, 30, 50, 60)
RATE_TOLERANCE = 0.01


class SourceSound:
    """The sound of one source.

    Attributes:
        samples: (n,) int16, 16 kHz mono; None without a recording.
        features: (rows, *front_end.row_shape) float32; None if there are none, or they cannot be used.
        dropped: what is left out, in words.
    """

    def __init__(
        self,
        source: Source,
        options: SourceOptions,
        report: Report,
        progress: Progress,
        network: UNet | None,
        encoder: AudioEncoder | None,
    ) -> None:
        self.source, self.options, self.report, self.progress = source, options, report, progress
        self.network, self.encoder = network, encoder
        self.samples: Int16 | None = None
        self.features: Float32 | None = None
        self.front_end: AudioFrontEnd | None = None
        self.dropped: list[str] = []

    def look(self) -> None:
        self.look_at_speech()
        self.look_at_features()

    def look_at_speech(self) -> None:
        path = self.source.speech
        if path is None:
            return
        where = printable(path.name)
        try:
            self.progress("recording", 0, 1)
            self.samples = read_audio(path)
            self.progress("recording", 1, 1)
        except MediaError as error:
            if path == self.source.video:  # nobody said that it has a sound track
                return
            found = str(error).removeprefix(f"{path.name}: ")
            self.report.warning("recording-unreadable", where, found, "the package gets no recording")

    def look_at_features(self) -> None:
        fits = list(self.network.config.audio_shapes) if self.network is not None else [f.name for f in FRONT_ENDS]
        files = {name: path for name, path in self.source.features.items() if name in fits or not name}
        if len(files) > 1:
            found = "several feature files fit the network: " + ", ".join(path.name for path in files.values())
            self.report.error("features-several", "features", found, "name one with --features")
        elif files:
            self.read_features(next(iter(files.values())))
        elif self.source.features:
            names = ", ".join(path.name for path in self.source.features.values())
            found = f"{names}, which the network does not hear; it hears {' or '.join(fits)}"
            self.report.error("features-of-another-kind", "features", found, "name its feature file with --features")
        else:
            self.make_features(fits)

    def read_features(self, path: Path) -> None:
        where = printable(path.name)
        try:
            array = open_array(path)
            self.front_end, row_shape = front_end_of(array.shape)
            check_finite(array)
            self.features = to_float32(array).reshape(len(array), *row_shape)
        except Fault as fault:
            self.report.error("features-unusable", where, fault.found, f"give {fault.expected}")
            return
        except OSError as error:
            self.report.error("features-unusable", where, f"cannot be read ({error.strerror})", "make it readable")
            return
        if self.network is not None and self.front_end.name not in self.network.config.audio_shapes:
            found = f"{self.front_end.name} features, which the network does not hear"
            self.report.error("features-of-another-kind", where, found, "name its feature file with --features")

    def make_features(self, fits: list[str]) -> None:
        """AVE features of the recording, where there is no file of them."""
        expected = " or ".join(f.file_name for f in FRONT_ENDS if f.name in fits)
        lacks = [
            what for what, there in (("recording", self.samples), ("audio encoder", self.encoder)) if there is None
        ]
        if "ave" not in fits or lacks:
            found = f"no feature file ({expected})"
            found += f", and no {' and no '.join(lacks)} to make one with" if "ave" in fits else ""
            self.report.error("features-missing", "features", found, "name it with --features")
            return
        assert self.encoder is not None and self.samples is not None
        try:
            self.progress("features", 0, 1)
            self.features = audio_features(self.encoder, self.samples)
            self.progress("features", 1, 1)
        except MediaError as error:
            self.report.error("features-missing", "features", str(error), "name a feature file with --features")
            return
        self.front_end = FRONT_ENDS[0]
        found, done = "no feature file", f"{len(self.features)} AVE rows are made from the recording"
        self.report.info("features-made", "features", found, done)

    def fit_rows(self, end: int) -> int:
        """Where the video ends, for as many feature rows as there are: training, too, takes the shorter of both."""
        assert self.features is not None
        n_rows, off = len(self.features), end - len(self.features)
        where = "features"
        if off == 0:
            return end
        if abs(off) <= MAX_FEATURE_ROWS_OFF:
            what = "fewer" if off > 0 else "more"
            found = f"{n_rows} rows for {end} frames, {abs(off)} {what}"
            done = "as usual: rows beyond the end count as zeros" if off > 0 else "rows beyond the end are kept"
            self.report.info("features-off-by-few", where, found, done)
            return end
        found = f"{n_rows} rows for {end} frames"
        if abs(off) > max(MAX_ROWS_CUT_S * VIDEO_FPS, MAX_ROWS_CUT_PART * end):
            done = f"give the features of this video, a row for each frame at {VIDEO_FPS} a second"
            self.report.error("features-do-not-fit", where, found, done)
            return end
        if off > 0:
            done = f"as in training, the shorter counts: the last {off} frames are left out"
            self.dropped.append(f"{off} frames without feature rows")
        else:
            done = f"as in training, the shorter counts: the last {-off} rows are left out"
            self.dropped.append(f"{-off} feature rows without frames")
        self.report.warning("features-cut", where, found, done)
        return min(end, n_rows)

    def check_duration(self, n_frames: int) -> None:
        """The recording's length against the video's, of so many frames."""
        if self.samples is None:
            return
        duration_s = len(self.samples) / SAMPLE_RATE_HZ
        off_s = duration_s - n_frames / VIDEO_FPS
        if abs(off_s) <= DURATION_OFF_S:
            return
        video_s = n_frames / VIDEO_FPS
        found = f"{duration_s:.2f} s for {n_frames} frames, which last {video_s:.2f} s at {VIDEO_FPS} a second"
        rates = [rate for rate in OTHER_RATES if abs(duration_s * rate - n_frames) <= RATE_TOLERANCE * n_frames]
        if rates:
            done = f"the frames seem to be taken at {rates[0]} a second: take them and their features at {VIDEO_FPS}"
            self.report.error("frames-other-rate", "recording", found, done)
        else:
            done = "what is beyond the video is left out" if off_s > 0 else "the video goes on without it"
            self.report.warning("recording-length", "recording", found, done)

    def idle(self, first: int, end: int, n_frames: int) -> Ranges:
        """Where the person rests, in a package of the source's frames [first, end), of `n_frames` in all."""
        if self.options.idle is not None:
            self.check_idle(self.options.idle, end - first)
            return self.options.idle
        if self.samples is None:
            done = "no idle stretches are marked; --idle sets them"
            self.report.info("recording-missing", "recording", "none", done)
            return ()
        within = [(max(a, first) - first, min(b, end) - first) for a, b in idle_ranges(self.samples, n_frames)]
        idle = tuple((a, b) for a, b in within if a < b)
        if idle:
            told = f"{len(idle)} quiet stretch{'es' if len(idle) > 1 else ''}, {seconds(idle):.1f} s"
            self.report.info("idle-found", "recording", told, "marked as idle: live sessions rest there")
        else:
            done = "no idle stretches are marked; --idle sets them"
            self.report.info("idle-none", "recording", f"no pause of {MIN_QUIET_S:g} s", done)
        return idle

    def check_idle(self, idle: Ranges, n_frames: int) -> None:
        bad = [stretch for stretch in idle if not 0 <= stretch[0] < stretch[1] <= n_frames]
        bad += [after for before, after in zip(idle, idle[1:], strict=False) if after[0] < before[1]]
        if bad:
            found = f"{bad[0][0]}:{bad[0][1]} leaves the {n_frames} frames, is empty, or overlaps another"
            self.report.error("idle-range", "--idle", found, f"give ranges within 0:{n_frames}")

"""The drawing: does what its parameters say, and its landmarks and rectangles are where the face is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lipsync.demo.measure import mouth_opening
from lipsync.demo.presenter import (
    CROP_SIZE,
    FRAME_HEIGHT,
    FRAME_WIDTH,
    MAX_GAP,
    Pose,
    crop_rectangle,
    draw_frame,
    draw_region,
    landmarks,
    pose_track,
)
from lipsync.demo.speech import ASSETS, CLOSED, Mouth, Timeline, frame_count, mouth_track, read_wav

N_FRAMES = 320


@pytest.mark.parametrize(
    ("width", "rounding", "teeth", "tongue"), [(0.0, 0.0, 0.5, 0.2), (0.8, 0.0, 1.0, 0.3), (-0.7, 0.9, 0.1, 0.0)]
)
def test_drawn_opening_is_the_opening_asked_for(width: float, rounding: float, teeth: float, tongue: float) -> None:
    """Whatever else the mouth does, and wherever the head is."""
    wanted = [0.0, 0.2, 0.45, 0.7, 1.0]
    measured = []
    for i, opening in enumerate(wanted):
        pose = Pose(5.3 * i - 10, 3.0 - i, 1.4 * i - 2.8)
        frame = draw_frame(pose, Mouth(opening, width, rounding, teeth, 0.0, tongue))
        measured.append(mouth_opening(np.asarray(frame.image), frame.landmarks))
    assert measured == pytest.approx([MAX_GAP * opening for opening in wanted], abs=4)


def test_frames_have_the_size_of_the_video() -> None:
    """1280x720 RGB."""
    image = draw_frame(Pose()).image
    assert (image.size, image.mode) == ((FRAME_WIDTH, FRAME_HEIGHT), "RGB")


def test_region_is_a_part_of_the_frame() -> None:
    """The network is trained on regions and used on frames."""
    pose, mouth = Pose(6.4, -2.2, 1.7), Mouth(0.6)
    frame = draw_frame(pose, mouth)
    region = draw_region(pose, mouth, frame.rectangle)
    assert np.array_equal(np.asarray(region), np.asarray(frame.image.crop(frame.rectangle)))


def test_only_the_lower_face_moves_with_speech() -> None:
    """Same pose, other mouth: eyes, brows, hair and background are the same to the bit."""
    pose = Pose(3.1, 1.0, -1.2)
    shut, wide = (np.asarray(draw_frame(pose, mouth).image) for mouth in (CLOSED, Mouth(1.0)))
    rows = np.flatnonzero((shut != wide).any(axis=(1, 2)))
    eyes = landmarks(pose, CLOSED)[36:48, 1]
    assert rows.min() > eyes.max() + 20


def test_rectangles_are_squares_inside_the_frame_that_move_smoothly() -> None:
    """And the face's landmarks lie inside, but for the ears' side of the jaw."""
    last = None
    for pose in pose_track(N_FRAMES):
        x1, y1, x2, y2 = crop_rectangle(pose)
        assert x2 - x1 == y2 - y1 == CROP_SIZE
        assert 0 <= x1 < x2 <= FRAME_WIDTH and 0 <= y1 < y2 <= FRAME_HEIGHT
        for mouth in (CLOSED, Mouth(1.0)):
            points = landmarks(pose, mouth)
            assert points.shape == (68, 2)
            assert (points >= (x1, y1)).all() and (points <= (x2, y2)).all()
        if last is not None:
            assert max(abs(x1 - last[0]), abs(y1 - last[1])) <= 4
        last = (x1, y1)


def test_landmarks_follow_the_usual_annotation() -> None:
    """Jaw from the image's left, nose in the middle, left-hand eye before the right-hand one, lips around the mouth."""
    points = landmarks(Pose(), Mouth(0.8))
    assert points[0, 0] < points[8, 0] < points[16, 0]
    assert points[8, 1] == points[:17, 1].max()
    assert (np.diff(points[:17, 0]) > 0).all()
    assert (np.diff(points[17:27, 0]) > 0).all()
    assert points[36:42, 0].max() < points[30, 0] < points[42:48, 0].min()
    assert points[48, 0] < points[51, 0] < points[54, 0]
    assert points[66, 1] - points[62, 1] == pytest.approx(0.8 * MAX_GAP, abs=1)


def test_presenter_sways_and_blinks() -> None:
    """Head moves, and the eyes are shut a few times in the video, seldom for long."""
    poses = pose_track(N_FRAMES)
    assert np.ptp([pose.x for pose in poses]) > 10
    assert np.ptp([pose.tilt for pose in poses]) > 2
    shut = np.array([pose.blink == 1 for pose in poses])
    assert 3 <= np.count_nonzero(np.diff(shut.astype(int)) == 1) <= 8
    assert shut.mean() < 0.1


def test_a_blink_covers_the_iris() -> None:
    """The picture of the eye changes from blue to skin."""
    for blink, is_blue in ((0.0, True), (1.0, False)):
        frame = draw_frame(Pose(blink=blink))
        x, y = frame.landmarks[36:42].mean(axis=0).astype(int)
        red, _, blue = np.asarray(frame.image)[y - 6 : y + 6, x - 10 : x + 10].reshape(-1, 3).mean(axis=0)
        assert (blue > red) == is_blue


@pytest.mark.parametrize("path", [ASSETS / "speech", Path(__file__).parent / "unheard"], ids=["speech", "unheard"])
def test_mouth_track_opens_for_speech_and_closes_in_pauses(path: Path) -> None:
    """The timeline belongs to the recording: where it is silent, lips touch."""
    samples = read_wav(path.with_suffix(".wav"))
    n_frames = frame_count(len(samples))
    track = mouth_track(Timeline.load(path.with_suffix(".json")), n_frames)
    assert track.shape == (n_frames, 6)
    assert track[:, 0].min() >= 0 and 0.6 < track[:, 0].max() <= 1
    padded = np.resize(samples, n_frames * 640).reshape(n_frames, 640).astype(np.float32)
    quiet = np.sqrt((padded**2).mean(axis=1)) < 30
    inside = quiet & np.roll(quiet, 1) & np.roll(quiet, -1) & np.roll(quiet, 2) & np.roll(quiet, -2)
    assert np.count_nonzero(inside) > 15
    assert track[inside, 0].max() < 0.15

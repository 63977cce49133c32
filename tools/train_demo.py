"""Train the demo's audio encoder and U-Net, from nothing to two files of weights.

    python tools/train_demo.py --out lipsync/demo/assets

Needs libespeak-ng and a CPU; no footage and no recordings. Four stages; what the last three learn is kept in `--work`,
so that an interrupted run goes on with the stage that it was in:

1. speech: random sentences by many voices, with the times of their phonemes;
2. audio: the encoder and the U-Net's audio branch learn the mouth's shape from sound;
3. face: the U-Net learns to repaint the mouth of a drawn face. It sees the presenter with some other mouth and must
   paint the one that stage 2 heard: so lips can only come from the sound, everything else from the picture;
4. together: encoder and U-Net, at a low rate.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from make_demo_speech import LEAD_S, TAIL_S, UNHEARD, Synthesiser, Voice, with_silence
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from lipsync.demo.build import face_of_crop, resized_crop
from lipsync.demo.evaluate import correlation_at, opening_while_speaking
from lipsync.demo.presenter import BLINK_LEVELS, MAX_SWAY, MAX_TILT, Pose, crop_rectangle, draw_region
from lipsync.demo.speech import ASSETS, N_SHAPE_VALUES, Mouth, Timeline, mouth_track
from lipsync.engine.audio import AudioEncoder, feature_count, mel_spectrogram
from lipsync.engine.geometry import GEOMETRIES
from lipsync.engine.unet import UNet, UNetConfig

Float32 = npt.NDArray[np.float32]

ENCODER_WIDTHS = (16, 32, 64, 128, 512)
UNET_CONFIG = replace(UNetConfig().scaled(0.25), up=(32, 24, 16, 12, 8))
STEPS = (1240, 1800, 300)
"""Of the three stages that learn."""
WINDOW_BEFORE, WINDOW_AFTER = 8, 7
SEGMENT_FRAMES = 16
N_HELD_OUT = 40
MAX_LOGIT = 5.0
"""Beyond it the sigmoid has hardly a gradient: a spot that went there by chance would never come back."""
PART_Y, PART_X = slice(128, 320), slice(64, 256)
"""The lower face, in whole steps of the U-Net's waist."""
PARTS_UNTIL = 0.6
"""Up to this much of stage 3, two of three steps see the lower face alone: cheaper, and what is to be learned is there.
After it, whole faces: what lies beside the part must fit again."""
SHAPE_WEIGHTS = (3.0, 1.0, 1.0, 0.7, 1.0, 0.5)

VOICES = ("en-us", "en-us", "en-us", "en-gb-x-rp", "en-gb-scotland")
VARIANTS = (
    "m1 m2 m3 m3 m3 m4 m5 m6 m7 m8 f1 f2 f3 f4 f5 Andy Alex Alicia Andrea Annie Denis Gene Hugo Jacky Lee Marco Mario "
    "Michael Mike Storm adam antonio belinda benjamin boris david ed edward2 grandpa iven john linda marcelo max "
    "michel miguel norbert paul pedro quincy rob robert sandro shelby steph travis victor zac"
).split()
WORDS = (
    "a about above account across act add after again age air all almost alone along also always amber among and "
    "angle animal answer any apple arm around arrive art ask away baby back bad bag ball band bank bar base basket "
    "bath be bear beat beauty become bed before begin behind believe bell below best better between big bird bite "
    "black blue board boat body bone book both bottle bottom bowl box boy brave bread break breathe bridge bright "
    "bring brother brown brush build burn busy but butter buy by cake call calm camp can car care carry catch cause "
    "change chair cheap cheese child choice choose church city clear climb clock close cloud coat coffee cold "
    "colour come common copper corner count country cover cow cream cross cry cup cut dance dark day deep desk "
    "different dinner dog door double down draw dream dress drink drive dry during each ear early earth east easy "
    "eat edge egg eight either else empty end enough even evening every example eye face fact fall family famous "
    "far farm fast father favour fear feel few field fifty fight fill film find fine finger finish fire first fish "
    "five flat floor flower fly follow food foot for force forest forget form forward four free fresh friend from "
    "front fruit full funny future game garden gate gather gentle girl give glass go gold good great green ground "
    "group grow guess hair half hand happy hard harm hat have head hear heart heavy help her here high him his hold "
    "hole home honey hope horse hot hour house how hundred hurry ice idea if important in inside into iron island "
    "it job join joy judge jump just keep kind king kitchen know lady lake lamp land large last late laugh law lay "
    "lazy lead leaf learn leave left less let letter level life lift light like line lion list listen little live "
    "long look lose loud love low lunch machine make man many map march mark market matter may me mean measure meat "
    "meet member middle milk mind minute miss mix moment money month moon more morning most mother mountain mouth "
    "move much music must my name narrow near neck need never new next nice night nine no noise north nose not "
    "nothing now number ocean of off offer office often oil old on once one only open or orange order other our out "
    "over own page pain paint pair paper park part party pass past path pay peace pen people perhaps person picture "
    "piece pink place plain plan plant play please pocket point poor possible pound power press pretty price "
    "problem pull pump purple push put quarter queen question quick quiet quite rabbit race radio rain raise reach "
    "read ready real reason red remember rest rice rich ride right ring rise river road rock roof room rose rough "
    "round row rule run sad safe sail salt same sand save say school sea season seat second see seem sell send "
    "seven shade shake shape share sharp she ship shirt shoe shop short should shout show side sign silver simple "
    "sing sister sit six size skin sky sleep slow small smell smile smoke smooth snow so soap soft some song soon "
    "sound soup south space speak special speech spell spend spoon spring square stand star start station stay step "
    "still stone stop store storm story street strong such sugar summer sun sure sweet swim table take talk tall "
    "taste tea teach team ten than thank that the their them then there these they thick thin thing think third "
    "this thought thousand three through throw time to today together tomorrow too tooth top touch toward town toy "
    "train travel tree trouble true try turn twelve twenty two under until up use usual valley value very view "
    "village visit voice wait walk wall want war warm was wash watch water wave way we weak wear weather week well "
    "west wet what wheel when where which while white who whole why wide wife wild will win wind window wine winter "
    "wise wish with woman wonder wood word work world worry would write wrong yard year yellow yes yet you young "
    "your zebra zero"
).split()


@dataclass
class Utterance:
    """One recording as the networks hear it.

    mels: one (n, 80) float32 for each recording condition. shapes: (frames, 6) float32.
    """

    mels: list[Tensor]
    shapes: Tensor


def sentences(rng: random.Random) -> str:
    """Two or three sentences of random words, with commas."""
    made = []
    for _ in range(rng.randint(2, 3)):
        words = rng.choices(WORDS, k=rng.randint(3, 10))
        if len(words) > 5 and rng.random() < 0.6:
            words[rng.randint(1, 3)] += ","
        made.append(" ".join(words).capitalize() + rng.choice(".....?!"))
    return " ".join(made)


def disturb(samples: npt.NDArray[np.int16], rng: np.random.Generator) -> Float32:
    """Another recording of the same: softer or louder, brighter or duller, with noise. (n,) float32 in -1..1."""
    sound = samples.astype(np.float64) / 32768
    spectrum = np.fft.rfft(sound)
    frequency = np.linspace(0, 1, len(spectrum))
    tilt_db = rng.normal(0, 4) * (frequency - 0.3) * 2 + rng.normal(0, 2) * np.sin(frequency * rng.uniform(4, 12))
    sound = np.fft.irfft(spectrum * 10 ** (tilt_db / 20), len(sound))
    sound *= 10 ** (rng.uniform(-16, 3) / 20)
    noise = rng.normal(size=len(sound))
    if rng.random() < 0.5:
        noise = np.convolve(noise, np.ones(8) / 8, "same")
    sound += noise * np.sqrt(np.mean(sound**2)) * 10 ** (-rng.uniform(18, 60) / 20)
    return np.clip(sound, -1, 1).astype(np.float32)


def make_corpus(minutes: float, seed: int) -> list[Utterance]:
    """Speech enough for so many minutes, in three recording conditions each."""
    synthesiser = Synthesiser()
    choice, rng = random.Random(seed), np.random.default_rng(seed)
    corpus: list[Utterance] = []
    seconds = 0.0
    while seconds < minutes * 60:
        name = f"{choice.choice(VOICES)}+{choice.choice(VARIANTS)}"
        voice = Voice(name, choice.randint(120, 190), choice.randint(20, 75), choice.randint(20, 80))
        samples, timeline = synthesiser.say(sentences(choice), voice)
        corpus.append(listen(samples, timeline, [disturb(samples, rng) for _ in range(2)]))
        seconds += timeline.duration_s
        print(f"\rspeech: {seconds / 60:.1f} of {minutes:.0f} min", end="", flush=True)
    print()
    return corpus


def listen(samples: npt.NDArray[np.int16], timeline: Timeline, others: list[Float32]) -> Utterance:
    """The spectrograms and the mouth's track of a recording."""
    mels = [torch.from_numpy(mel_spectrogram(part)) for part in (samples, *others)]
    shapes = torch.from_numpy(mouth_track(timeline, feature_count(len(mels[0]))))
    return Utterance(mels, shapes)


def feature_inputs(mel: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """What the encoder hears for some feature rows: (n, 1, 80, 16), and (n, 1) 0 where the row does not exist."""
    count = feature_count(len(mel))
    exists = ((rows >= 0) & (rows < count)).float()[:, None]
    inner = (rows.clamp(0, count - 1) - 1).clamp(0, count - 3)
    starts = (inner * 80 // 25).clamp(max=len(mel) - 16)
    return mel.unfold(0, 16, 1)[starts][:, None], exists


def windows_of(features: Tensor, n_frames: int) -> Tensor:
    """(batch, n_frames + 15, 512) consecutive rows to (batch * n_frames, 32, 16, 16) windows."""
    stacked = features.unfold(1, WINDOW_BEFORE + WINDOW_AFTER + 1, 1)  # (batch, n_frames, 512, 16)
    return stacked.transpose(2, 3).reshape(-1, 32, 16, 16)


class ShapeHead(nn.Module):
    """The mouth's shape, from every place of the audio branch's output: (n, channels, 10, 10) to (n, 6, 10, 10)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.read = nn.Conv2d(channels, N_SHAPE_VALUES, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.read(x)
        return y


def shape_loss(read: Tensor, shapes: Tensor) -> Tensor:
    """Mean weighted error, over all places but the rim."""
    error = functional.smooth_l1_loss(
        read[:, :, 1:9, 1:9].float(), shapes[:, :, None, None].expand(-1, -1, 8, 8), beta=0.1, reduction="none"
    )
    return (error * torch.tensor(SHAPE_WEIGHTS)[:, None, None]).mean()


def segments(corpus: list[Utterance], batch: int, rng: random.Random) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Random stretches of speech: encoder inputs, which rows exist, shapes."""
    n_rows = SEGMENT_FRAMES + WINDOW_BEFORE + WINDOW_AFTER
    while True:
        heard, exist, shapes = [], [], []
        for _ in range(batch):
            utterance = rng.choice(corpus)
            first = rng.randint(0, len(utterance.shapes) - SEGMENT_FRAMES)
            rows = torch.arange(first - WINDOW_BEFORE, first - WINDOW_BEFORE + n_rows)
            inputs, exists = feature_inputs(rng.choice(utterance.mels), rows)
            heard.append(inputs)
            exist.append(exists)
            shapes.append(utterance.shapes[first : first + SEGMENT_FRAMES])
        yield torch.cat(heard), torch.stack(exist), torch.cat(shapes)


def one_cycle(step: float, top: float) -> float:
    """The learning rate at `step`, 0..1: up over the first 5 %, then a cosine down."""
    if step < 0.05:
        return top * (0.1 + 0.9 * step / 0.05)
    return top * 0.5 * (1 + float(np.cos(np.pi * (step - 0.05) / 0.95))) + 1e-6


def schedule(n_steps: int, minutes: float) -> Iterator[tuple[int, float]]:
    """Steps of a stage, from 1, and how far it is, 0..1: so many steps, or (unless 0) for so many minutes."""
    began, step = time.monotonic(), 0
    while True:
        done = (time.monotonic() - began) / (60 * minutes) if minutes else step / n_steps
        if done >= 1:
            return
        step += 1
        yield step, done


def train_audio(
    corpus: list[Utterance], held_out: list[Utterance], n_steps: int, minutes: float, seed: int, work: Path
) -> tuple[AudioEncoder, UNet, ShapeHead]:
    """Stage 2. Returns the encoder, a U-Net of which only the audio branch is trained, and what reads shapes in it."""
    torch.manual_seed(seed)
    encoder, unet = AudioEncoder(ENCODER_WIDTHS), UNet(UNET_CONFIG)
    head = ShapeHead(UNET_CONFIG.audio[-1])
    branch = unet.audio_model
    kept = work / "audio.pt"
    if kept.exists():
        state = torch.load(kept)
        encoder.load_state_dict(state["encoder"])
        branch.load_state_dict(state["branch"])
        head.load_state_dict(state["head"])
        return encoder, unet, head
    modules = nn.ModuleList([encoder, branch, head]).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(modules.parameters(), weight_decay=0.01)
    batches = segments(corpus, 8, random.Random(seed))
    n_rows = SEGMENT_FRAMES + WINDOW_BEFORE + WINDOW_AFTER
    mean_loss = 0.5
    for step, done in schedule(n_steps, minutes):
        for group in optimizer.param_groups:
            group["lr"] = one_cycle(done, 2e-3)
        heard, exist, shapes = next(batches)
        with torch.autocast("cpu", torch.bfloat16):
            features = encoder(heard).view(-1, n_rows, 512) * exist
            read = head(branch(windows_of(features, SEGMENT_FRAMES)))
        loss = shape_loss(read, shapes)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        mean_loss += 0.02 * (loss.item() - mean_loss)
        if step % 20 == 0:
            print(f"\raudio: step {step}, {done:.0%}, loss {mean_loss:.4f}", end="", flush=True)
        if step % 300 == 0:
            print(" held out:", audio_score(encoder, branch, head, held_out), flush=True)
    print(" held out:", audio_score(encoder, branch, head, held_out), flush=True)
    torch.save({"encoder": encoder.state_dict(), "branch": branch.state_dict(), "head": head.state_dict()}, kept)
    return encoder, unet, head


@torch.inference_mode()
def audio_score(encoder: nn.Module, branch: nn.Module, head: nn.Module, held_out: list[Utterance]) -> list[float]:
    """Correlation of each value of the mouth's shape with what it should be, on speech that was not trained on."""
    for module in (encoder, branch, head):
        module.eval()
    read, wanted = [], []
    for utterance in held_out:
        n_frames = len(utterance.shapes)
        rows = torch.arange(-WINDOW_BEFORE, n_frames + WINDOW_AFTER)
        inputs, exist = feature_inputs(utterance.mels[0], rows)
        features = encoder(inputs) * exist
        read.append(head(branch(windows_of(features[None], n_frames)))[:, :, 2:8, 2:8].mean((2, 3)))
        wanted.append(utterance.shapes)
    for module in (encoder, branch, head):
        module.train()
    a, b = torch.cat(read), torch.cat(wanted)
    return [round(float(np.corrcoef(a[:, i], b[:, i])[0, 1]), 3) for i in range(N_SHAPE_VALUES)]


@dataclass
class FaceBank:
    """Drawn faces, two of each pose with different mouths, and the sound that belongs to each.

    faces: (n, 2, 320, 320, 3) uint8 BGR. sounds: (n, 2, 16, 512) float16 feature windows.
    heard, exist: what the encoder made the windows from: (n, 2, 16, 80, 16) float16 and (n, 2, 16) float16.
    """

    faces: Tensor
    sounds: Tensor
    heard: Tensor
    exist: Tensor


def random_pose(rng: random.Random) -> Pose:
    """Any pose of the presenter; two of three with open eyes."""
    blink = 0.0 if rng.random() < 0.65 else rng.randint(1, BLINK_LEVELS) / BLINK_LEVELS
    return Pose(
        rng.uniform(-1, 1) * MAX_SWAY, rng.uniform(-0.6, 0.6) * MAX_SWAY, rng.uniform(-1.05, 1.05) * MAX_TILT, blink
    )


def draw_pair(task: tuple[Pose, Float32, Float32]) -> npt.NDArray[np.uint8]:
    """One pose with two mouths: (2, 320, 320, 3) uint8 BGR."""
    pose, *shapes = task
    rectangle = crop_rectangle(pose)
    pair = [face_of_crop(resized_crop(draw_region(pose, Mouth.from_array(s), rectangle)))[..., ::-1] for s in shapes]
    return np.stack(pair)


def make_bank(
    corpus: list[Utterance], encoder: AudioEncoder, branch: nn.Module, head: ShapeHead, n: int, seed: int
) -> FaceBank:
    """Draw `n` poses, each with the mouths of two random moments of speech, as stage 2 hears them.

    Drawn as heard, not as the timeline has it: what sound cannot tell would only blur the painted lips.
    """
    rng = random.Random(seed)
    moments = []
    for _ in range(2 * n):
        utterance = rng.choice(corpus)
        frame = rng.randrange(len(utterance.shapes))
        rows = torch.arange(frame - WINDOW_BEFORE, frame + WINDOW_AFTER + 1)
        moments.append(feature_inputs(rng.choice([utterance.mels[0], *utterance.mels]), rows))
    heard = torch.stack([inputs[:, 0].half() for inputs, _ in moments])
    exist = torch.stack([exists[:, 0].half() for _, exists in moments])
    sounds, shapes = read_shapes(encoder, branch, head, heard, exist)
    tasks = [(random_pose(rng), *shapes[2 * i : 2 * i + 2].numpy()) for i in range(n)]
    faces = torch.empty((n, 2, 320, 320, 3), dtype=torch.uint8)
    with multiprocessing.get_context("spawn").Pool() as pool:
        for i, pair in enumerate(pool.imap(draw_pair, tasks, chunksize=8)):
            faces[i] = torch.from_numpy(pair)
            if i % 20 == 0:
                print(f"\rfaces: {i} of {n}", end="", flush=True)
    print()
    return FaceBank(faces, *(part.view(n, 2, *part.shape[1:]) for part in (sounds, heard, exist)))


@torch.no_grad()
def read_shapes(
    encoder: AudioEncoder, branch: nn.Module, head: ShapeHead, heard: Tensor, exist: Tensor
) -> tuple[Tensor, Tensor]:
    """Feature windows (n, 16, 512) float16, and the mouths that are heard in them, (n, 6) float32.

    A guess is always a little less than what it guesses, and never quite 0: stretched, closed lips are closed.
    """
    for module in (encoder, branch, head):
        module.eval()
    features = torch.cat([encoder(part.float()).half() for part in heard.flatten(0, 1)[:, None].split(256)])
    sounds = features.view(*heard.shape[:2], 512) * exist[..., None]
    read = [head(branch(part.float().view(-1, 32, 16, 16)))[:, :, 2:8, 2:8].mean((2, 3)) for part in sounds.split(128)]
    shapes = torch.cat(read) * 1.03
    shapes[:, 0] = (shapes[:, 0] / 1.03 - 0.03) / 0.94
    shapes[:, 1] = shapes[:, 1].clamp(-1, 1)
    shapes[:, [0, 2, 3, 4, 5]] = shapes[:, [0, 2, 3, 4, 5]].clamp(0, 1)
    return sounds, shapes


def stretch_matrix(n: int, first: int, last: int) -> Tensor:
    """How rows `first` to `last` of `n` become twice as many, as the U-Net's `interpolate` does it: (2k, k)."""
    at = torch.arange(2 * first, 2 * last) * ((n - 1) / (2 * n - 1)) - first
    at = at.clamp(0, last - first - 1)
    low = at.long().clamp(max=last - first - 2)
    matrix = torch.zeros(2 * (last - first), last - first)
    rows = torch.arange(len(at))
    matrix[rows, low] = 1 - (at - low)
    matrix[rows, low + 1] = at - low
    return matrix


def paint_part(unet: UNet, face: Tensor, audio: Tensor) -> Tensor:
    """The network over PART_Y, PART_X of the face alone: (n, 6, 320, 320) to (n, 3, 192, 192).

    What the network sees of the face is cut out first, so that the mouth costs a third of a whole face; places keep
    the positions that they have in a whole face.
    """
    n_steps = len(unet.config.down)
    whole = 2**n_steps
    y1, y2, x1, x2 = (edge // whole for edge in (PART_Y.start, PART_Y.stop, PART_X.start, PART_X.stop))
    part = face[:, :, PART_Y, PART_X].contiguous(memory_format=torch.channels_last)
    skips = [unet.inc(part)]
    for i in range(n_steps):
        skips.append(getattr(unet, f"down{i + 1}")(skips[-1]))
    heard = unet.audio_model(audio)[:, :, y1:y2, x1:x2]
    x = unet.fuse_conv(torch.cat((skips[-1], heard), dim=1))
    for i in range(n_steps):
        zoom = 2**i
        down = stretch_matrix(10 * zoom, y1 * zoom, y2 * zoom)
        across = stretch_matrix(10 * zoom, x1 * zoom, x2 * zoom)
        x = (down @ x @ across.T).contiguous(memory_format=torch.channels_last)
        x = getattr(unet, f"up{i + 1}").conv(torch.cat((x, skips[-2 - i]), dim=1))
    painted: Tensor = torch.sigmoid(unet.outc(x))
    return painted


def attention() -> Tensor:
    """Where errors count more: mouth and chin, and the rim, where the face is pasted. (1, 1, 320, 320)."""
    y, x = torch.meshgrid(torch.arange(320.0), torch.arange(320.0), indexing="ij")
    mouth = torch.exp(-((((x - 160) / 64) ** 2 + ((y - 214) / 48) ** 2) ** 2))
    eyes = torch.exp(-((((x - 160).abs() - 64) / 36) ** 2) - ((y - 76) / 22) ** 2)
    rim = ((x < 6) | (x > 313) | (y < 6) | (y > 313)).float()
    return (1 + 6 * mouth + 2 * eyes + 5 * rim)[None, None]


def picture_loss(painted: Tensor, wanted: Tensor, weight: Tensor) -> Tensor:
    """Weighted L1 of colours and of edges."""
    error = painted - wanted
    across, down = error.diff(dim=3), error.diff(dim=2)
    return (
        (error.abs() * weight).mean()
        + 0.6 * (across.abs() * weight[..., 1:]).mean()
        + 0.6 * (down.abs() * weight[:, :, 1:]).mean()
    )


def face_input(face: Tensor) -> Tensor:
    """(n, 3, 320, 320) BGR 0..1 to (n, 6, 320, 320): the face, and the face with the mouth blacked out."""
    masked = face.clone()
    geometry = GEOMETRIES[320]
    masked[:, :, slice(*geometry.mask_y), slice(*geometry.mask_x)] = 0
    return torch.cat((face, masked), dim=1).contiguous(memory_format=torch.channels_last)


def take(bank: FaceBank, picks: list[int], rng: random.Random) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
    """References, targets (both (n, 3, 320, 320) 0..1) and where the targets' sound is in the bank."""
    where = [(i, rng.randrange(2)) for i in picks]
    wanted = torch.stack([bank.faces[i, j] for i, j in where]).permute(0, 3, 1, 2).float()
    shown = torch.stack([bank.faces[i, 1 - j] for i, j in where]).permute(0, 3, 1, 2).float()
    # The output is truncated to whole levels, not rounded: aim at their middles.
    return shown / 255, (wanted + 0.5) / 255, where


@torch.inference_mode()
def psnr(unet: UNet, bank: FaceBank, picks: range) -> tuple[float, float]:
    """Mean PSNR in dB on faces that were not trained on: of the whole face, and around the mouth."""
    unet.eval()
    rng, whole, mouth = random.Random(0), [], []
    for i in picks:
        shown, wanted, where = take(bank, [i], rng)
        error = (unet(face_input(shown), bank.sounds[where[0]].float().view(1, 32, 16, 16)) - wanted) ** 2
        whole.append(-10 * float(error.mean().log10()))
        mouth.append(-10 * float(error[:, :, 165:265, 95:225].mean().log10()))
    return sum(whole) / len(whole), sum(mouth) / len(mouth)


def frozen_batch_norm(module: nn.Module) -> None:
    """Batch norm as it will be when used."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eval()


@torch.no_grad()
def settle_batch_norm(unet: UNet, bank: FaceBank, rng: random.Random) -> None:
    """Take the statistics of batch norm from whole faces, with the weights as they are now."""
    parts = [part for name, part in unet.named_modules() if isinstance(part, nn.BatchNorm2d) and "audio" not in name]
    for part in parts:
        part.reset_running_stats()
        part.momentum = None  # a plain average
    unet.train()
    unet.audio_model.eval()
    for _ in range(40):
        shown, _, where = take(bank, rng.sample(range(len(bank.faces) - N_HELD_OUT), 4), rng)
        features = torch.stack([bank.sounds[at] for at in where]).float()
        unet(face_input(shown), features.view(-1, 32, 16, 16))
    for part in parts:
        part.momentum = 0.1


def train_face(
    encoder: AudioEncoder, unet: UNet, bank: FaceBank, *, together: bool, n_steps: int, minutes: float, seed: int
) -> None:
    """Stage 3, or 4 (`together`). The bank's last poses are held out."""
    torch.manual_seed(seed)
    rng, weight = random.Random(seed), attention()
    n_train = len(bank.faces) - N_HELD_OUT
    unet.to(memory_format=torch.channels_last)
    audio = list(encoder.parameters()) + list(unet.audio_model.parameters())
    painting = [p for name, p in unet.named_parameters() if not name.startswith("audio_model.")]
    groups = [{"params": painting, "share": 1.0}, {"params": audio if together else [], "share": 0.25}]
    optimizer = torch.optim.AdamW(groups, weight_decay=1e-4, betas=(0.9, 0.98))
    if together:
        settle_batch_norm(unet, bank, rng)
    last: dict[str, Tensor] = {}
    unet.outc.register_forward_hook(lambda module, given, out: last.update(logits=out))
    mean_loss = 0.05
    order: list[int] = []
    for step, done in schedule(n_steps, minutes):
        for group in optimizer.param_groups:
            group["lr"] = one_cycle(done, 4e-4 if together else 2e-3) * group["share"]
        whole = together or done > PARTS_UNTIL or step % 3 == 0
        n_faces = 4 if whole else 8
        if len(order) < n_faces:
            order = rng.sample(range(n_train), n_train)
        shown, wanted, where = take(bank, [order.pop() for _ in range(n_faces)], rng)
        shown += torch.randn_like(shown) * (rng.random() * 1.2 / 255)
        unet.train()
        unet.audio_model.eval()
        if together or not whole:  # statistics are those of whole faces
            frozen_batch_norm(unet)
        if together:
            frozen_batch_norm(encoder)
            heard = torch.stack([bank.heard[at] for at in where]).float()
            exist = torch.stack([bank.exist[at] for at in where]).float()
            features = encoder(heard.view(-1, 1, 80, 16)).view(-1, 16, 512) * exist[..., None]
        else:
            features = torch.stack([bank.sounds[at] for at in where]).float()
        windows = features.view(-1, 32, 16, 16)
        with torch.autocast("cpu", torch.bfloat16, enabled=not together):
            painted = unet(face_input(shown), windows) if whole else paint_part(unet, face_input(shown), windows)
        if whole:
            loss = picture_loss(painted.float(), wanted, weight)
        else:
            here = (slice(None), slice(None), PART_Y, PART_X)
            inner = (slice(None), slice(None), slice(24, None), slice(24, -24))
            loss = picture_loss(painted.float()[inner], wanted[here][inner], weight[here][inner])
        loss = loss + 0.3 * functional.relu(last["logits"].float().abs() - MAX_LOGIT).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(painting, 1.0)
        optimizer.step()
        mean_loss += 0.02 * (loss.item() - mean_loss)
        if step % 20 == 0:
            print(f"\r{'together' if together else 'face'}: step {step}, {done:.0%}, loss {mean_loss:.4f}",
                  end="", flush=True)  # fmt: skip
        if step % 200 == 0:
            score = psnr(unet, bank, range(n_train, n_train + 12))
            print(f" held out: {score[0]:.1f} dB, mouth {score[1]:.1f} dB", flush=True)
    score = psnr(unet, bank, range(n_train, n_train + N_HELD_OUT))
    print(f"\n{step} steps; held out: {score[0]:.2f} dB, mouth {score[1]:.2f} dB", flush=True)


def save_weights(module: nn.Module, path: Path) -> None:
    """The state dict as fp16 safetensors."""
    state = {key: value.half() if value.is_floating_point() else value for key, value in module.state_dict().items()}
    save_file({key: value.contiguous() for key, value in state.items()}, path)
    path.chmod(0o644)  # safetensors writes for the owner alone
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


def main() -> None:
    """Train, write the weights, and print what they can do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder for the two files of weights")
    parser.add_argument("--work", type=Path, default=Path("demo-training"), help="folder for what stages hand on")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--speech-minutes", type=float, default=40, help="how much speech is synthesised")
    parser.add_argument("--poses", type=int, default=1600, help="how many poses are drawn, two faces each")
    parser.add_argument("--steps", type=int, nargs=3, default=STEPS, metavar=("AUDIO", "FACE", "TOGETHER"))
    parser.add_argument("--minutes", type=float, nargs=3, default=(0, 0, 0), metavar=("AUDIO", "FACE", "TOGETHER"),
                        help="train each stage for so long, instead of so many steps")  # fmt: skip
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: as many as torch likes")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    seed: int = arguments.seed

    corpus = make_corpus(arguments.speech_minutes, seed)
    samples, timeline = with_silence(*Synthesiser().say(UNHEARD), LEAD_S, TAIL_S)
    steps, minutes = arguments.steps, arguments.minutes
    encoder, unet, head = train_audio(corpus, [listen(samples, timeline, [])], steps[0], minutes[0], seed, work)
    bank = make_bank(corpus, encoder, unet.audio_model, head, arguments.poses, seed + 1)
    for stage, together in ((1, False), (2, True)):
        kept = work / ("together.pt" if together else "face.pt")
        if not kept.exists():
            train_face(encoder, unet, bank, together=together, n_steps=steps[stage], minutes=minutes[stage], seed=seed)
            torch.save({"encoder": encoder.state_dict(), "unet": unet.state_dict()}, kept)
        state = torch.load(kept)
        encoder.load_state_dict(state["encoder"])
        unet.load_state_dict(state["unet"])

    save_weights(unet, arguments.out / "network.safetensors")
    save_weights(encoder, arguments.out / "audio_encoder.safetensors")
    painted, drawn = opening_while_speaking(encoder.eval(), unet.eval(), samples, timeline)
    by_lag = {lag: correlation_at(painted, drawn, lag) for lag in range(-6, 7)}
    best = max(by_lag, key=lambda lag: by_lag[lag])
    print(f"unheard speech: correlation of the opening {by_lag[0]:.3f} at lag 0, best at lag {best}")


if __name__ == "__main__":
    main()

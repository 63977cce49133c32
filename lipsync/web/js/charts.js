// What is measured, over the last minute: one small picture each, with the same in words.

const SAMPLES = 120;
const EVERY_MS = 500;
const WIDTH = 240;
const HEIGHT = 64;
const FRAME_MS = 40;

const STEPS = ["queue", "prepare", "inference", "composite", "encode", "network"];
const SVG = "http://www.w3.org/2000/svg";

/** Draws into an element, while `isLive()`. */
export class Charts {
  constructor(place, player, { isLive }) {
    this.player = player;
    this.samples = [];
    this.missedBefore = 0;
    this.charts = [new Latency(place), new FramesPerSecond(place), new Missed(place), new SyncError(place)];
    setInterval(() => isLive() && document.visibilityState === "visible" && this.sample(), EVERY_MS);
  }

  /** Of another performance. */
  restart() {
    this.samples = [];
    this.missedBefore = this.player.missed;
  }

  sample() {
    const measured = this.player.measured;
    const missedNow = Math.max(0, measured.missed - this.missedBefore);
    this.missedBefore = measured.missed;
    this.samples = [...this.samples, { ...measured, missedNow }].slice(-SAMPLES);
    this.charts.forEach((chart) => chart.draw(this.samples));
  }
}

class Chart {
  constructor(place, title) {
    const figure = document.createElement("figure");
    const caption = document.createElement("figcaption");
    const name = document.createElement("span");
    name.textContent = title;
    this.value = document.createElement("span");
    this.value.className = "value";
    this.value.textContent = "–";
    caption.append(name, this.value);
    this.svg = shape("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", preserveAspectRatio: "none" });
    this.title = title;
    this.describe("nothing measured yet");
    figure.append(caption, this.svg);
    place.append(figure);
    this.figure = figure;
  }

  describe(text) {
    this.svg.setAttribute("aria-label", `${this.title}: ${text}`);
  }

  add(kind, attributes) {
    const made = shape(kind, attributes);
    this.svg.append(made);
    return made;
  }

  /** A line across, at a height of the picture. */
  mark(y) {
    return this.add("line", { class: "mark", x1: 0, x2: WIDTH, y1: y, y2: y });
  }
}

class Latency extends Chart {
  constructor(place) {
    super(place, "Latency by step");
    this.areas = STEPS.map((step, n) => this.add("path", { class: `step step-${n}` }));
    const legend = document.createElement("dl");
    legend.className = "legend";
    this.values = STEPS.map((step, n) => {
      const pair = document.createElement("div");
      const term = document.createElement("dt");
      term.className = `swatch step-${n}`;
      term.textContent = step;
      const value = document.createElement("dd");
      value.textContent = "–";
      pair.append(term, value);
      legend.append(pair);
      return value;
    });
    this.figure.append(legend);
  }

  draw(samples) {
    const totals = samples.map(({ latency_ms }) => STEPS.reduce((sum, step) => sum + latency_ms[step], 0));
    const scale = HEIGHT / (1.1 * Math.max(1, ...totals));
    let floor = samples.map(() => 0);
    STEPS.forEach((step, n) => {
      const top = floor.map((below, k) => below + samples[k].latency_ms[step]);
      const up = top.map((ms, k) => `${x(k, samples)},${HEIGHT - ms * scale}`);
      const down = floor.map((ms, k) => `${x(k, samples)},${HEIGHT - ms * scale}`).reverse();
      this.areas[n].setAttribute("d", `M${[...up, ...down].join("L")}Z`);
      floor = top;
    });
    const { latency_ms } = samples.at(-1);
    STEPS.forEach((step, n) => (this.values[n].textContent = latency_ms[step].toFixed(1)));
    const { cached } = samples.at(-1);
    this.value.textContent = `${totals.at(-1).toFixed(1)} ms${cached ? ", kept" : ""}`;
    this.value.title = cached ? "The server had made these frames before, and kept them" : "";
    this.describe(STEPS.map((step) => `${step} ${latency_ms[step].toFixed(1)} ms`).join(", "));
  }
}

class FramesPerSecond extends Chart {
  constructor(place) {
    super(place, "Frames/s");
    this.mark(this.y(25));
    this.line = this.add("path", { class: "line" });
  }

  y(fps) {
    return HEIGHT - (Math.min(fps, 30) / 30) * HEIGHT;
  }

  draw(samples) {
    this.line.setAttribute("d", path(samples.map(({ fps }, k) => [x(k, samples), this.y(fps)])));
    const { fps } = samples.at(-1);
    this.value.textContent = String(fps);
    this.describe(`${fps} now; 25 is all of them`);
  }
}

class Missed extends Chart {
  constructor(place) {
    super(place, "Frames missed");
    this.mark(HEIGHT - 1);
    this.bars = this.add("path", { class: "bars" });
  }

  draw(samples) {
    const most = Math.max(5, ...samples.map(({ missedNow }) => missedNow));
    const bars = samples
      .map(({ missedNow }, k) => [x(k, samples), (missedNow / most) * HEIGHT])
      .filter(([, height]) => height > 0)
      .map(([at, height]) => `M${at},${HEIGHT}V${HEIGHT - height}`);
    this.bars.setAttribute("d", bars.join(""));
    const { missed } = samples.at(-1);
    this.value.textContent = String(missed);
    this.describe(`${missed} since it began`);
  }
}

class SyncError extends Chart {
  constructor(place) {
    super(place, "Sync error");
    // within these lines it is less than a frame
    this.mark(this.y(FRAME_MS));
    this.mark(this.y(-FRAME_MS));
    this.line = this.add("path", { class: "line" });
  }

  y(ms) {
    const most = 2 * FRAME_MS;
    return HEIGHT / 2 - (Math.max(-most, Math.min(most, ms)) / most) * (HEIGHT / 2 - 1);
  }

  draw(samples) {
    this.line.setAttribute("d", path(samples.map(({ sync_error_ms }, k) => [x(k, samples), this.y(sync_error_ms)])));
    const { sync_error_ms: ms } = samples.at(-1);
    this.value.textContent = `${ms.toFixed(0)} ms`;
    const side = ms > 0 ? "the picture is late" : ms < 0 ? "the picture is early" : "sound and picture are together";
    this.describe(`${Math.abs(ms).toFixed(0)} ms at worst in the last second; ${side}`);
  }
}

/** Where a sample is drawn: the newest at the right. */
function x(index, samples) {
  return ((SAMPLES - samples.length + index) / (SAMPLES - 1)) * WIDTH;
}

function path(points) {
  return `M${points.map(([at, y]) => `${at.toFixed(1)},${y.toFixed(1)}`).join("L")}`;
}

function shape(kind, attributes) {
  const made = document.createElementNS(SVG, kind);
  for (const [name, value] of Object.entries(attributes)) {
    made.setAttribute(name, value);
  }
  return made;
}

// What a page draws and sounds, noted down from outside: at the browser's own functions, before the page's code runs.
// Times are those of performance.now().

window.probe = {
  draws: [], // frames on the canvas: {at, first_sample, end_sample, frame_id, speaking, jpeg}
  starts: [], // of sounds: {at, context, when, offset, duration, loop}
  stops: [], // of sounds: when
  keys: [], // pressed: {at, key}
  violations: [], // of the content security policy
  samples: null, // see `watch`

  /** How loud it is now, 0 for silence: the loudest sample of the last 23 ms. */
  get level() {
    if (this.analyser === undefined) {
      return 0;
    }
    const samples = new Float32Array(1024);
    this.analyser.getFloatTimeDomainData(samples);
    return samples.reduce((loudest, sample) => Math.max(loudest, Math.abs(sample)), 0);
  },

  /** Where in its buffer the sound that was started last is heard now, in seconds; null while there is none.
   *
   * The browser itself says which time of the context leaves the loudspeaker. */
  get heard() {
    const sound = this.starts.at(-1);
    if (sound === undefined || this.stops.some((at) => at >= sound.at)) {
      return null;
    }
    const { contextTime, performanceTime } = sound.context.getOutputTimestamp();
    const now = contextTime + (performance.now() - performanceTime) / 1000;
    return now < sound.when ? null : now - sound.when + sound.offset;
  },

  /** From now on note what is heard beside what is seen, on each of the screen's frames. */
  watch() {
    this.samples = [];
    const sample = () => {
      const heard = this.heard;
      const shown = window.lipsync.player.shown;
      this.samples.push({ at: performance.now(), heard, first: shown?.first_sample, end: shown?.end_sample });
      requestAnimationFrame(sample);
    };
    requestAnimationFrame(sample);
  },
};

{
  const { drawImage } = CanvasRenderingContext2D.prototype;
  CanvasRenderingContext2D.prototype.drawImage = function (...given) {
    drawImage.apply(this, given);
    if (this.canvas.id === "face") {
      const at = performance.now();
      queueMicrotask(() => probe.draws.push({ ...window.lipsync.player.shown, at }));
    }
  };

  const { start } = AudioBufferSourceNode.prototype;
  AudioBufferSourceNode.prototype.start = function (when = 0, offset = 0, ...rest) {
    start.call(this, when, offset, ...rest);
    const { context, loop } = this;
    const { duration } = this.buffer;
    probe.starts.push({ at: performance.now(), context, when: Math.max(when, context.currentTime), offset, duration, loop });
  };

  const { stop } = AudioScheduledSourceNode.prototype;
  AudioScheduledSourceNode.prototype.stop = function (...given) {
    stop.apply(this, given);
    probe.stops.push(performance.now());
  };

  const { connect } = AudioNode.prototype;
  AudioNode.prototype.connect = function (to, ...rest) {
    if (to instanceof AudioDestinationNode) {
      probe.analyser ??= new AnalyserNode(this.context, { fftSize: 1024 });
      connect.call(this, probe.analyser);
    }
    return connect.call(this, to, ...rest);
  };

  document.addEventListener("keydown", ({ key, timeStamp }) => probe.keys.push({ at: timeStamp, key }), true);
  document.addEventListener("securitypolicyviolation", ({ violatedDirective, blockedURI }) =>
    probe.violations.push(`${violatedDirective}: ${blockedURI}`),
  );
}

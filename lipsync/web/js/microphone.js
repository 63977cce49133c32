// What a microphone hears, as it hears it.

/** A microphone that cannot be had, and why, in words. */
export class MicrophoneError extends Error {}

const WORDS = {
  NotAllowedError: "the browser was not allowed to use the microphone; allow it in the address bar, then press again",
  NotFoundError: "there is no microphone",
  NotReadableError: "the microphone is in use by another program",
};

const MAX_DELAY_S = 5;

/** Open with `Microphone.open`; close it when done, so that the browser's sign goes out. */
export class Microphone {
  /** `heard(pcm)` is called with each 40 ms: bytes of 16 kHz mono s16le. Throws MicrophoneError. */
  static async open(context, heard) {
    if (navigator.mediaDevices === undefined) {
      throw new MicrophoneError(
        "browsers give the microphone to pages of https:// and of localhost only; this page is neither",
      );
    }
    let stream;
    try {
      const audio = { channelCount: 1, echoCancellation: true, noiseSuppression: true, autoGainControl: true };
      stream = await navigator.mediaDevices.getUserMedia({ audio });
    } catch (error) {
      throw new MicrophoneError(WORDS[error.name] ?? `the microphone cannot be had: ${error.message}`);
    }
    try {
      await context.audioWorklet.addModule(new URL("./microphone-worklet.js", import.meta.url).href);
      return new Microphone(context, stream, heard);
    } catch (error) {
      stream.getTracks().forEach((track) => track.stop());
      throw new MicrophoneError(`the microphone's sound cannot be read: ${error.message}`);
    }
  }

  constructor(context, stream, heard) {
    this.context = context;
    this.stream = stream;
    this.startedAt = null; // the context's clock when the first sample was heard
    this.source = context.createMediaStreamSource(stream);
    const mono = { channelCount: 1, channelCountMode: "explicit" };
    this.worklet = new AudioWorkletNode(context, "microphone", { numberOfOutputs: 0, ...mono });
    this.delay = new DelayNode(context, { maxDelayTime: MAX_DELAY_S });
    this.worklet.port.onmessage = ({ data }) => {
      this.startedAt ??= data.startedAt;
      heard(data.pcm);
    };
    this.source.connect(this.worklet);
  }

  /** Let it be heard, so much later; null: not. */
  hear(delayS) {
    if (delayS === null) {
      this.delay.disconnect();
      this.hearing = false;
      return;
    }
    this.delay.delayTime.value = Math.min(MAX_DELAY_S, Math.max(0, delayS));
    if (!this.hearing) {
      this.source.connect(this.delay).connect(this.context.destination);
      this.hearing = true;
    }
  }

  close() {
    this.worklet.port.onmessage = null;
    this.stream.getTracks().forEach((track) => track.stop());
    this.source.disconnect();
    this.worklet.disconnect();
    this.delay.disconnect();
  }
}

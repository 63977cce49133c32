// Samples as they are sent: 16 kHz, mono, whole numbers of 16 bits, little-endian.

export const RATE_HZ = 16_000;
export const FRAMES_PER_S = 25; // of every package's video
export const SAMPLES_PER_FRAME = RATE_HZ / FRAMES_PER_S;

/** Samples in -1..1 as bytes. */
export function toS16(samples) {
  const bytes = new Uint8Array(samples.length * 2);
  const view = new DataView(bytes.buffer);
  for (let n = 0; n < samples.length; n += 1) {
    const whole = Math.round(samples[n] * 32768);
    view.setInt16(n * 2, Math.max(-32768, Math.min(32767, whole)), true);
  }
  return bytes;
}

/** The mean of an AudioBuffer's channels. */
export function toMono(buffer) {
  const mono = new Float32Array(buffer.length);
  for (let channel = 0; channel < buffer.numberOfChannels; channel += 1) {
    const samples = buffer.getChannelData(channel);
    for (let n = 0; n < mono.length; n += 1) {
      mono[n] += samples[n] / buffer.numberOfChannels;
    }
  }
  return mono;
}

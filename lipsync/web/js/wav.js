// WAV files that already are what is sent.

import { RATE_HZ } from "./pcm.js";

const PCM = 1;

/** The samples of a WAV file of 16 kHz, mono, 16 bits, as they are; null of any other file.
 *
 * Browsers' decoders give samples in -1..1, and do not agree on what 1 is: back in 16 bits, some are off by one. */
export function plainPcm(buffer) {
  const view = new DataView(buffer);
  const word = (at) => (at + 4 <= buffer.byteLength ? view.getUint32(at) : 0);
  if (word(0) !== tag("RIFF") || word(8) !== tag("WAVE")) {
    return null;
  }
  let isPlain = false;
  for (let at = 12; at + 8 <= buffer.byteLength; ) {
    const length = view.getUint32(at + 4, true);
    const content = at + 8;
    if (word(at) === tag("fmt ") && content + 16 <= buffer.byteLength) {
      const format = view.getUint16(content, true);
      const channels = view.getUint16(content + 2, true);
      const bits = view.getUint16(content + 14, true);
      isPlain = format === PCM && channels === 1 && view.getUint32(content + 4, true) === RATE_HZ && bits === 16;
    } else if (word(at) === tag("data")) {
      // a file that was cut short, or written as it was recorded, says more than it holds
      const held = Math.min(length, buffer.byteLength - content);
      return isPlain ? new Uint8Array(buffer.slice(content, content + held - (held % 2))) : null;
    }
    at = content + length + (length % 2);
  }
  return null;
}

function tag(text) {
  return [...text].reduce((word, letter) => word * 256 + letter.charCodeAt(0), 0);
}

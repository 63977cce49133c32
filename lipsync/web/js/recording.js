// Files of sound: what is sent of them, and what is heard.

import { RATE_HZ, toMono, toS16 } from "./pcm.js";
import { plainPcm } from "./wav.js";

const MIB = 2 ** 20;
const MAX_FILE_BYTES = 200 * MIB;
const MAX_S = 600;

/** A file that cannot be used, and why, in words. */
export class RecordingError extends Error {}

/** A file into `{pcm, buffer}`: 16 kHz mono s16le, and an AudioBuffer of full quality.
 *
 * Throws RecordingError. */
export async function readRecording(file, context) {
  if (file.size > MAX_FILE_BYTES) {
    const megabytes = Math.round(file.size / MIB);
    throw new RecordingError(
      `the file ${file.name} has ${megabytes} MB; ${MAX_FILE_BYTES / MIB} MB is the most that is read here`,
    );
  }
  let bytes, sent;
  try {
    bytes = await file.arrayBuffer();
    // a browser resamples what it decodes to the context's rate, and keeps the bytes: it gets a copy
    sent = await new OfflineAudioContext(1, 1, RATE_HZ).decodeAudioData(bytes.slice(0));
  } catch {
    throw new RecordingError(
      `the file ${file.name} is not a sound file that this browser can read; WAV, MP3, Ogg and M4A mostly are`,
    );
  }
  if (sent.duration > MAX_S) {
    const minutes = Math.ceil(sent.duration / 60);
    throw new RecordingError(`the file ${file.name} lasts ${minutes} minutes; at most ${MAX_S / 60} are spoken here`);
  }
  const pcm = plainPcm(bytes) ?? toS16(toMono(sent));
  const buffer = await context.decodeAudioData(bytes);
  return { pcm, buffer };
}

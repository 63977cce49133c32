// The face speaks what the microphone hears, as it hears it.

import { Microphone } from "./microphone.js";
import { withResolvers } from "./promises.js";
import { restOf } from "./resting.js";
import { Session } from "./session.js";
import { LiveTimeline } from "./timeline.js";

/** `run` listens until `finish` or `stop`, or until it fails. */
export class Listening {
  constructor(stage, model, { startFrame, hear }) {
    this.stage = stage;
    this.model = model;
    this.startFrame = startFrame;
    this.isHeard = hear;
    this.over = withResolvers();
  }

  async run() {
    const { player, sound } = this.stage;
    this.stage.say("Asking for the microphone…");
    const microphone = await Microphone.open(sound.context, (pcm) => this.heard(pcm));
    if (this.isStopped) {
      microphone.close();
      return;
    }
    this.microphone = microphone;
    this.timeline = new LiveTimeline(sound);
    player.begin(this.timeline);
    try {
      this.session = new Session(this.stage, this.model, {
        startFrame: this.startFrame,
        on: {
          arriving: ({ first_sample }) => {
            this.timeline.arrived(first_sample);
            this.listen();
          },
        },
      });
      this.session.ended.then(this.over.resolve, this.over.reject);
      this.stage.say("Listening: the face speaks what you say.");
      await this.over.promise;
    } finally {
      this.stop();
    }
  }

  /** Whether the speaker hears themselves, with the picture. */
  hear(isHeard) {
    this.isHeard = isHeard;
    this.listen();
  }

  listen() {
    const { microphone, timeline } = this;
    if (microphone !== undefined && timeline.zero !== null && microphone.startedAt !== null) {
      microphone.hear(this.isHeard ? timeline.zero - microphone.startedAt : null);
    }
  }

  heard(pcm) {
    this.session?.send(pcm);
  }

  /** Ends it; the picture stays. */
  stop() {
    this.isStopped = true;
    this.microphone?.close();
    this.microphone = undefined;
    this.session?.cancel();
    this.over.resolve();
  }

  /** Ends it. Resolves to a resting frame to go on from, or null. */
  async interrupt() {
    const { session } = this;
    this.session = undefined; // it ends by itself
    this.stop();
    const interrupted = (await session?.interrupt()) ?? null;
    return interrupted?.frame?.success ? restOf(interrupted) : null;
  }
}

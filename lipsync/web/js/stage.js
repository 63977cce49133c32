// What is performed: one thing at a time, of one model.

import { Listening } from "./listening.js";
import { Playing } from "./playing.js";
import { readRecording } from "./recording.js";
import { restingFrame } from "./resting.js";
import { Speaking } from "./speaking.js";

const ROUND_TRIP_EVERY_MS = 2000;

/** Events: "change" (what is performed, of whom); "say" and "complain", whose `detail` is the words, empty if all is
 * well. */
export class Stage extends EventTarget {
  constructor({ connection, player, sound, recordings }) {
    super();
    this.connection = connection;
    this.player = player;
    this.sound = sound;
    this.recordings = recordings;
    this.model = null;
    this.metadata = null;
    this.nextFrame = 0; // of the video, to go on from
    this.kind = null; // "playing", "speaking", "listening"
    this.current = null;
    setInterval(() => this.current && this.measureRoundTrip(), ROUND_TRIP_EVERY_MS);
  }

  say(text) {
    this.tell("say", text);
  }

  complain(text) {
    this.tell("complain", text);
  }

  tell(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }

  /** Take another model; null for none. Its face rests. */
  async choose(model) {
    this.leave();
    this.model = model;
    this.metadata = null;
    this.nextFrame = 0;
    this.tell("change");
    if (model === null) {
      return;
    }
    try {
      const metadata = await this.connection.ask("GetModelMetadata", { model_name: model });
      if (this.model !== model) {
        return;
      }
      if (!metadata.success) {
        throw new Error(metadata.error);
      }
      this.metadata = metadata;
      this.tell("change");
      const { generation } = this.player;
      const rest = await restingFrame(this.connection, model, 0);
      if (this.player.generation === generation && this.model === model) {
        this.nextFrame = rest.nextFrame;
        await this.player.show(rest);
      }
    } catch (error) {
      if (this.model === model) {
        this.failed(error);
      }
    }
  }

  play({ repeat }) {
    const { model, metadata } = this;
    return this.perform("playing", () => new Playing(this, model, { frameCount: metadata.frame_count, repeat }));
  }

  speak(file) {
    const { model } = this;
    return this.perform("speaking", async () => {
      this.say(`Reading ${file.name}…`);
      const recording = await readRecording(file, this.sound.context);
      return new Speaking(this, model, { recording, name: file.name, startFrame: this.nextFrame });
    });
  }

  listen({ hear }) {
    const { model } = this;
    return this.perform("listening", () => new Listening(this, model, { startFrame: this.nextFrame, hear }));
  }

  /** Whether whoever speaks into the microphone hears themselves. */
  hear(isHeard) {
    this.current?.performance?.hear?.(isHeard);
  }

  /** The sound stops at once, nothing that speaks is drawn any more, and the face goes to rest. */
  async interrupt() {
    const { current, player } = this;
    if (current === null) {
      return;
    }
    this.silence();
    const { generation } = player;
    this.say("Interrupted.");
    try {
      const rest = (await current.performance?.interrupt()) ?? null;
      if (rest !== null && player.generation === generation) {
        this.nextFrame = rest.nextFrame;
        await player.show(rest);
      }
    } catch (error) {
      this.failed(error);
    }
  }

  /** End what is performed, and leave the picture as it is. */
  leave() {
    const { current } = this;
    this.silence();
    current?.performance?.stop();
  }

  silence() {
    this.current = null;
    this.kind = null;
    this.player.end();
    this.sound.stop();
    this.tell("change");
  }

  async perform(kind, make) {
    this.leave();
    const current = { performance: null };
    const isOn = () => this.current === current;
    this.current = current;
    this.kind = kind;
    this.complain("");
    this.tell("change");
    try {
      await this.sound.open(() => this.say("Press a key or click: browsers let a page sound only then."));
      if (!isOn()) {
        return;
      }
      const made = await make();
      if (!isOn()) {
        return;
      }
      current.performance = made;
      await made.run();
      if (isOn()) {
        await this.finish();
      }
    } catch (error) {
      if (isOn()) {
        this.silence();
        this.say("Stopped.");
        this.failed(error);
      }
    }
  }

  /** What was performed is at its end. */
  async finish() {
    this.silence();
    this.say("Done.");
    if (this.player.shown?.speaking) {
      const { generation } = this.player;
      const rest = await restingFrame(this.connection, this.model, this.player.shown.frame_id);
      if (this.player.generation === generation) {
        this.nextFrame = rest.nextFrame;
        await this.player.show(rest);
      }
    }
  }

  /** A connection that is lost is told of elsewhere. */
  failed(error) {
    if (!error.isLost) {
      this.complain(sentence(error.message));
    }
  }

  async measureRoundTrip() {
    const start = performance.now();
    try {
      await this.connection.ask("HealthCheck", {});
      this.player.measureStep("network", performance.now() - start);
    } catch {
      // whoever performs is told
    }
  }
}

function sentence(text) {
  const trimmed = text.trim().replace(/\.$/, "");
  return `${trimmed.charAt(0).toUpperCase()}${trimmed.slice(1)}.`;
}

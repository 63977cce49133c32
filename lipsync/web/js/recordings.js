// The recordings of packages, decoded; the last one is kept.

export class Recordings {
  constructor(connection, sound) {
    this.connection = connection;
    this.sound = sound;
    this.forget();
  }

  forget() {
    this.kept = { model: null, buffer: null };
  }

  /** An AudioBuffer, or null if the model has no recording. Throws an Error with the server's words. */
  async of(model) {
    if (this.kept.model === model) {
      return this.kept.buffer;
    }
    const { token } = this.connection;
    const response = await fetch(`/recordings/${encodeURIComponent(model)}`, {
      headers: token ? { Authorization: `Bearer ${token}` } : {},
    });
    let buffer = null;
    if (response.ok) {
      buffer = await this.sound.context.decodeAudioData(await response.arrayBuffer());
    } else if (response.status !== 404) {
      throw new Error((await response.text()) || `the recording cannot be had: status ${response.status}`);
    }
    this.kept = { model, buffer };
    return buffer;
  }
}

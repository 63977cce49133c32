// The models there are: cards with a little of each one's video, that move while they are seen.

import { restingFrame } from "./resting.js";

const PICTURES = 5; // of each model
const EVERY = 2; // frames of the video from one to the next
const REQUEST_EVERY_MS = 350; // for all models together
const MOVE_EVERY_MS = 320;
const WIDTH = 240;

/** Fills a list with a button for each model. Event "chosen", with `detail`, the model's name. */
export class Gallery extends EventTarget {
  /** `isBusy()`: while true nothing is asked for, because frames are wanted for something better. */
  constructor(list, connection, { isBusy }) {
    super();
    this.list = list;
    this.connection = connection;
    this.isBusy = isBusy;
    this.cards = new Map(); // by model
    this.calm = matchMedia("(prefers-reduced-motion: reduce)");
    this.seen = new IntersectionObserver((entries) => {
      for (const { target, isIntersecting } of entries) {
        const card = this.cards.get(target.dataset.model);
        if (card !== undefined) {
          card.isSeen = isIntersecting;
        }
      }
    });
    setInterval(() => this.fetchOne(), REQUEST_EVERY_MS);
    setInterval(() => this.move(), MOVE_EVERY_MS);
  }

  /** The models to show, and which is chosen. Pictures of those that were there are kept. */
  update(models, chosen) {
    for (const [model, card] of this.cards) {
      if (!models.includes(model)) {
        this.seen.unobserve(card.item);
        card.item.remove();
        card.pictures.forEach((picture) => picture.close());
        this.cards.delete(model);
      }
    }
    for (const model of models) {
      if (!this.cards.has(model)) {
        this.add(model);
      }
      const { item } = this.cards.get(model);
      this.list.append(item); // in the list's order
    }
    this.choose(chosen);
  }

  choose(chosen) {
    for (const [model, { button }] of this.cards) {
      button.setAttribute("aria-pressed", String(model === chosen));
    }
  }

  /** Their packages may be other ones now. */
  refresh() {
    for (const card of this.cards.values()) {
      card.wanted = null;
      card.isFailed = false;
    }
  }

  add(model) {
    const item = document.createElement("li");
    item.dataset.model = model;
    const button = document.createElement("button");
    button.type = "button";
    button.className = "card";
    const canvas = document.createElement("canvas");
    canvas.width = WIDTH;
    canvas.height = (WIDTH * 9) / 16;
    canvas.setAttribute("aria-hidden", "true");
    const name = document.createElement("span");
    name.className = "name";
    name.textContent = model;
    const about = document.createElement("span");
    about.className = "about";
    button.append(canvas, name, about);
    button.addEventListener("click", () => this.dispatchEvent(new CustomEvent("chosen", { detail: model })));
    item.append(button);
    // wanted: video frames that are still to be had; null: not known yet which
    const state = { pictures: [], wanted: null, at: 0, isSeen: false, isFailed: false };
    this.cards.set(model, { model, item, button, canvas, about, ...state });
    this.seen.observe(item);
  }

  get isIdle() {
    return document.visibilityState === "visible" && this.connection.state === "connected" && !this.isBusy();
  }

  /** One request, for the first card that lacks something. */
  async fetchOne() {
    if (this.isFetching || !this.isIdle) {
      return;
    }
    const seen = [...this.cards.values()].filter((card) => card.isSeen && !card.isFailed);
    const lacking = seen.filter((card) => card.wanted?.length !== 0);
    // one picture of each first
    const card = lacking.sort((a, b) => a.pictures.length - b.pictures.length)[0];
    if (card === undefined || (this.calm.matches && card.pictures.length > 0)) {
      return;
    }
    this.isFetching = true;
    try {
      await this.fetchFor(card);
    } catch (error) {
      card.isFailed = !error.isLost;
      if (card.isFailed) {
        card.about.textContent = "no picture";
        card.button.title = error.message;
      }
    } finally {
      this.isFetching = false;
    }
  }

  async fetchFor(card) {
    if (card.wanted !== null) {
      const frame = card.wanted.shift();
      const request = { model_name: card.model, frame_id: frame, video_type: "full_body" };
      const answer = await this.connection.ask("GetVideoFrame", request);
      if (!answer.success) {
        throw new Error(answer.error);
      }
      await this.keep(card, answer.frame_data);
      return;
    }
    const metadata = await this.connection.ask("GetModelMetadata", { model_name: card.model });
    if (!metadata.success) {
      throw new Error(metadata.error);
    }
    card.about.textContent = `${metadata.width}×${metadata.height}, ${(metadata.frame_count / 25).toFixed(0)} s`;
    const rest = await restingFrame(this.connection, card.model, 0);
    card.pictures.splice(0).forEach((picture) => picture.close());
    await this.keep(card, rest.jpeg);
    const more = Array.from({ length: PICTURES - 1 }, (_, n) => rest.frame_id + (n + 1) * EVERY);
    card.wanted = more.filter((frame) => frame < metadata.frame_count);
  }

  async keep(card, jpeg) {
    const blob = new Blob([jpeg], { type: "image/jpeg" });
    const picture = await createImageBitmap(blob, { resizeWidth: WIDTH, resizeQuality: "medium" });
    if (!this.cards.has(card.model)) {
      picture.close();
      return;
    }
    card.pictures.push(picture);
    if (card.pictures.length === 1) {
      card.canvas.height = picture.height;
      draw(card.canvas, picture);
    }
  }

  /** The next picture of each that is seen, to and fro. */
  move() {
    if (this.calm.matches || document.visibilityState !== "visible") {
      return;
    }
    for (const card of this.cards.values()) {
      const { pictures } = card;
      if (card.isSeen && pictures.length > 1) {
        card.at = (card.at + 1) % (2 * pictures.length - 2);
        draw(card.canvas, pictures[card.at < pictures.length ? card.at : 2 * pictures.length - 2 - card.at]);
      }
    }
  }
}

function draw(canvas, picture) {
  canvas.getContext("2d").drawImage(picture, 0, 0);
}

// The client of the sub-protocol lipsync.v1.proto: calls over one WebSocket, which is made anew whenever it is lost.

import { decode, encode } from "./protobuf.js";
import { METHODS, TAG, WebCallEnd, WebCallOptions, WebMissed, WebTaken } from "./messages.js";

const PROTOCOL = "lipsync.v1.proto";
const BEARER = "lipsync.bearer.";
const HEADER_BYTES = 5;
const MAX_CALL = 2 ** 32 - 1;

const CONNECT_MS = 5000; // a handshake may take as long
const FIRST_PAUSE_MS = 500; // before the second attempt; each further one is twice as long
const MAX_PAUSE_MS = 10_000;
const NO_TOKEN = 4401; // close code: the server does not know this token
const UNAVAILABLE = 14;
const CANCELLED = 1;
const DEADLINE_EXCEEDED = 4;
export const UNAUTHENTICATED = 16;

/** A call that the server ended with an error, in its own words; or whose connection was lost. */
export class CallError extends Error {
  constructor(end) {
    super(end.message || `the call ended with status ${end.status}`);
    this.name = "CallError";
    this.status = end.status; // a gRPC status code
    this.reason = end.reason ?? "";
    this.fields = end.fields ?? {};
    this.retry_after_ms = end.retry_after_ms;
    this.request_id = end.request_id ?? "";
    this.isLost = end.isLost ?? false; // with its connection: `Connection.problem` says more
  }
}

const LOST = {
  status: UNAVAILABLE,
  reason: "ConnectionLostError",
  message: "the connection to the server was lost",
  isLost: true,
};

/** One call. `ended` resolves at its end, or rejects with a CallError. */
export class Call {
  constructor(connection, id, method, onAnswer) {
    this.id = id;
    this.method = method;
    this.isOpen = true;
    this.missed = 0; // frames that the server left out, because this client was slow
    this.connection = connection;
    this.onAnswer = onAnswer;
    this.cancelled = false;
    this.ended = new Promise((resolve, reject) => {
      this.resolve = resolve;
      this.reject = reject;
    });
    this.ended.catch(() => {}); // whoever does not wait for it need not hear of it
  }

  /** The first request opens the call, further ones are for streams. */
  send(request) {
    this.put(this.method.tag, encode(this.method.request, request));
  }

  /** No more requests. */
  finish() {
    this.put(TAG.FINISH);
  }

  /** No more answers: the call ends without an error. */
  cancel() {
    this.cancelled = true;
    this.put(TAG.CANCEL);
  }

  /** So many more answers are dealt with; a call with a `window` gets no more than that. */
  taken(count = 1) {
    this.put(TAG.TAKEN, encode(WebTaken, { count }));
  }

  put(tag, body) {
    if (this.isOpen) {
      this.connection.put(tag, this.id, body);
    }
  }

  received(tag, body) {
    if (tag === TAG.MISSED) {
      this.missing = (this.missing ?? 0) + decode(WebMissed, body).count;
      return;
    }
    const missed = this.missing ?? 0;
    this.missing = 0;
    this.missed += missed;
    if (!this.cancelled) {
      this.onAnswer(decode(this.method.answer, body), missed);
    }
  }

  over(end) {
    this.isOpen = false;
    if (end.status === 0 || (this.cancelled && end.status === CANCELLED)) {
      this.resolve();
    } else {
      this.reject(new CallError(end));
    }
  }
}

/** The server, as the page sees it. Events:
 *
 * "state": `state` has changed. It is one of "connecting", "connected", "waiting" (before it tries again in
 * `retryMs`), "refused" (the token is wrong: it waits for another), "closed". `problem` says why in words.
 */
export class Connection extends EventTarget {
  constructor(url, { token = "", socket = (...args) => new WebSocket(...args) } = {}) {
    super();
    this.url = url;
    this.token = token;
    this.state = "closed";
    this.problem = "";
    this.retryMs = 0;
    this.wasConnected = false;
    this.makeSocket = socket;
    this.socket = null;
    this.calls = new Map();
    this.lastId = 0;
    this.attempts = 0;
    this.timer = 0;
  }

  /** Connect, and from now on connect again whenever the connection is lost. */
  open() {
    if (this.state === "closed") {
      this.connect();
    }
  }

  close() {
    clearTimeout(this.timer);
    this.drop();
    this.change("closed");
  }

  /** Try now, without the rest of the pause. */
  hurry() {
    if (this.state === "waiting") {
      this.connect();
    }
  }

  /** Connect anew, with another token. */
  useToken(token) {
    this.token = token;
    this.attempts = 0;
    this.restart();
  }

  /** Give this connection up, and make another one at once. */
  restart() {
    if (this.state !== "closed") {
      this.drop();
      this.connect();
    }
  }

  /** Open a call. `onAnswer(answer, missed)` is called for each answer, and how many were left out before it.
   *
   * `options`: see WebCallOptions. Throws CallError while there is no connection. */
  call(name, onAnswer, options = null) {
    if (this.state !== "connected") {
      throw new CallError(LOST);
    }
    do {
      this.lastId = this.lastId >= MAX_CALL ? 1 : this.lastId + 1;
    } while (this.calls.has(this.lastId));
    const call = new Call(this, this.lastId, METHODS[name], onAnswer);
    this.calls.set(call.id, call);
    if (options !== null) {
      this.put(TAG.OPTIONS, call.id, encode(WebCallOptions, options));
    }
    return call;
  }

  /** The one answer to one request. Throws CallError. A server that says nothing at all for `timeoutMs` is given up. */
  async ask(name, request, { timeoutMs = 10_000 } = {}) {
    let answer;
    const call = this.call(name, (one) => (answer = one), { timeout_ms: timeoutMs });
    call.send(request);
    call.finish();
    // the server keeps the deadline; this is for one that is not there any more
    const timer = setTimeout(() => this.restart(), timeoutMs + 2000);
    try {
      await call.ended;
    } finally {
      clearTimeout(timer);
    }
    if (answer === undefined) {
      throw new CallError({ status: DEADLINE_EXCEEDED, message: "the server ended the call without an answer" });
    }
    return answer;
  }

  put(tag, call, body = new Uint8Array(0)) {
    if (this.socket === null || this.socket.readyState !== 1) {
      return;
    }
    const message = new Uint8Array(HEADER_BYTES + body.length);
    const view = new DataView(message.buffer);
    view.setUint8(0, tag);
    view.setUint32(1, call, true);
    message.set(body, HEADER_BYTES);
    this.socket.send(message);
  }

  connect() {
    clearTimeout(this.timer);
    this.farewell = null; // what the server said before it closed
    this.change("connecting");
    const protocols = [PROTOCOL, ...(this.token ? [BEARER + base64Url(this.token)] : [])];
    let socket;
    try {
      socket = this.makeSocket(this.url, protocols);
    } catch (error) {
      this.gone(null, String(error.message));
      return;
    }
    this.socket = socket;
    socket.binaryType = "arraybuffer";
    this.timer = setTimeout(() => socket.close(), CONNECT_MS);
    socket.onopen = () => {
      if (socket === this.socket) {
        clearTimeout(this.timer);
        this.change("connected");
        this.wasConnected = true;
      }
    };
    socket.onmessage = ({ data }) => {
      if (socket === this.socket) {
        this.received(new Uint8Array(data));
      }
    };
    socket.onclose = ({ code, reason }) => {
      if (socket === this.socket) {
        this.gone(code, reason);
      }
    };
  }

  received(message) {
    let tag, id, body;
    try {
      const view = new DataView(message.buffer, message.byteOffset, message.byteLength);
      [tag, id, body] = [view.getUint8(0), view.getUint32(1, true), message.subarray(HEADER_BYTES)];
      if (id !== 0) {
        this.attempts = 0; // a server that answers is there; one that only accepts may be a proxy without one
      }
      if (tag === TAG.END) {
        const end = decode(WebCallEnd, body);
        if (id === 0) {
          this.farewell = end;
        } else {
          this.calls.get(id)?.over(end);
          this.calls.delete(id);
        }
        return;
      }
      const call = this.calls.get(id);
      if (call !== undefined && (tag === TAG.MISSED || tag === call.method.tag)) {
        call.received(tag, body);
      }
    } catch (error) {
      console.error(`tag ${tag} of call ${id} cannot be dealt with`, error);
      this.restart();
    }
  }

  /** The socket has closed by itself. */
  gone(code, reason) {
    const farewell = this.farewell;
    const hadConnection = this.state === "connected";
    this.drop(farewell);
    this.problem = farewell?.message || reason || "";
    if (code === NO_TOKEN || farewell?.status === UNAUTHENTICATED) {
      this.change("refused");
      return;
    }
    const longest = Math.min(MAX_PAUSE_MS, FIRST_PAUSE_MS * 2 ** this.attempts);
    // by chance, so that not all pages come back in the same moment
    this.retryMs = Math.round(longest * (hadConnection ? Math.random() : 0.5 + Math.random() / 2));
    this.attempts += 1;
    this.change("waiting");
    this.timer = setTimeout(() => this.connect(), this.retryMs);
  }

  /** Forget the socket; calls that are open end. */
  drop(end = null) {
    clearTimeout(this.timer);
    const { socket } = this;
    this.socket = null;
    socket?.close();
    const calls = [...this.calls.values()];
    this.calls.clear();
    for (const call of calls) {
      call.over(end?.status ? { ...end, isLost: true } : LOST);
    }
  }

  change(state) {
    this.state = state;
    this.dispatchEvent(new Event("state"));
  }
}

function base64Url(text) {
  const binary = String.fromCharCode(...new TextEncoder().encode(text));
  return btoa(binary).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}

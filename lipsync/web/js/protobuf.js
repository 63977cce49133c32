// Protocol Buffers, as much as the contract needs: varints, floats, doubles, strings, bytes, messages, maps.
//
// A message is described by a table of its fields: {name: {number, type, of, repeated, optional}}.
// - type: "int" (int32, int64, enum), "bool", "float", "double", "string", "bytes", "message", "map" (of strings).
// - of: the table of a "message".
// - optional: sent even if it is the type's zero, and undefined if it was not sent. Messages are so always.
// Whole numbers are Numbers: beyond 2^53 they would lose bits, and nothing in the contract is that large.

const VARINT = 0;
const FIXED64 = 1;
const LENGTH = 2;
const FIXED32 = 5;
const WIRE = {
  int: VARINT,
  bool: VARINT,
  float: FIXED32,
  double: FIXED64,
  string: LENGTH,
  bytes: LENGTH,
  message: LENGTH,
  map: LENGTH,
};
const MAP_ENTRY = { key: { number: 1, type: "string" }, value: { number: 2, type: "string" } };

const utf8 = new TextEncoder();
const fromUtf8 = new TextDecoder();

/** The bytes of a message. Fields that the value lacks, and zeros, are left out. */
export function encode(table, value) {
  const out = [];
  let length = 0;
  const put = (bytes) => {
    out.push(bytes);
    length += bytes.length;
  };
  for (const [name, field] of Object.entries(table)) {
    const given = value[name];
    if (given === undefined || given === null) {
      continue;
    }
    if (field.type === "map") {
      for (const [key, text] of Object.entries(given)) {
        putField(put, field, encode(MAP_ENTRY, { key, value: text }));
      }
    } else if (field.repeated) {
      for (const one of given) {
        putField(put, field, one);
      }
    } else if (field.optional || field.type === "message" || !isZero(given)) {
      putField(put, field, given);
    }
  }
  const bytes = new Uint8Array(length);
  let at = 0;
  for (const part of out) {
    bytes.set(part, at);
    at += part.length;
  }
  return bytes;
}

/** The message that bytes hold: every field of the table, with its type's zero where it was not sent.
 *
 * Byte fields are views of `bytes`, not copies. Throws RangeError if it is malformed. */
export function decode(table, bytes) {
  const fields = fieldsByNumber(table);
  const value = {};
  for (const [name, field] of Object.entries(table)) {
    value[name] = emptyOf(field);
  }
  const reader = new Reader(bytes);
  while (!reader.atEnd) {
    const key = reader.varint();
    const wire = key % 8;
    const found = fields.get(Math.floor(key / 8));
    if (found === undefined) {
      reader.skip(wire);
      continue;
    }
    const [name, field] = found;
    if (field.repeated && wire === LENGTH && WIRE[field.type] !== LENGTH) {
      const packed = new Reader(reader.bytes());
      while (!packed.atEnd) {
        value[name].push(readValue(packed, field));
      }
      continue;
    }
    if (wire !== WIRE[field.type]) {
      throw new RangeError(`field ${name} has wire type ${wire}`);
    }
    const one = readValue(reader, field);
    if (field.type === "map") {
      value[name][one.key] = one.value;
    } else if (field.repeated) {
      value[name].push(one);
    } else {
      value[name] = one;
    }
  }
  return value;
}

const tables = new WeakMap();

function fieldsByNumber(table) {
  let fields = tables.get(table);
  if (fields === undefined) {
    fields = new Map(Object.entries(table).map(([name, field]) => [field.number, [name, field]]));
    tables.set(table, fields);
  }
  return fields;
}

function emptyOf(field) {
  if (field.repeated) {
    return [];
  }
  if (field.type === "map") {
    return {};
  }
  if (field.optional || field.type === "message") {
    return undefined;
  }
  return { bool: false, string: "", bytes: new Uint8Array(0) }[field.type] ?? 0;
}

function isZero(value) {
  return value === 0 || value === false || value === "" || value.length === 0;
}

function putField(put, field, value) {
  put(varint(field.number * 8 + WIRE[field.type]));
  switch (field.type) {
    case "int":
    case "bool":
      put(varint(Number(value)));
      return;
    case "float":
    case "double":
      put(float(value, field.type));
      return;
    default: {
      const bytes = contentOf(field, value);
      put(varint(bytes.length));
      put(bytes);
    }
  }
}

function contentOf(field, value) {
  switch (field.type) {
    case "string":
      return utf8.encode(value);
    case "message":
      return encode(field.of, value);
    default:
      return value;
  }
}

function varint(number) {
  // negative ones are 64 bits of two's complement, as in every language
  let rest = BigInt.asUintN(64, BigInt(Math.trunc(number)));
  const bytes = [];
  while (rest >= 128n) {
    bytes.push(Number(rest & 127n) | 128);
    rest >>= 7n;
  }
  bytes.push(Number(rest));
  return Uint8Array.from(bytes);
}

function float(number, type) {
  const bytes = new Uint8Array(type === "float" ? 4 : 8);
  const view = new DataView(bytes.buffer);
  if (type === "float") {
    view.setFloat32(0, number, true);
  } else {
    view.setFloat64(0, number, true);
  }
  return bytes;
}

function readValue(reader, field) {
  switch (field.type) {
    case "int":
      return reader.varint();
    case "bool":
      return reader.varint() !== 0;
    case "float":
      return reader.float();
    case "double":
      return reader.double();
    case "string":
      return fromUtf8.decode(reader.bytes());
    case "bytes":
      return reader.bytes();
    case "message":
      return decode(field.of, reader.bytes());
    default:
      return decode(MAP_ENTRY, reader.bytes());
  }
}

class Reader {
  constructor(bytes) {
    this.data = bytes;
    this.view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
    this.at = 0;
  }

  get atEnd() {
    return this.at >= this.data.length;
  }

  /** A whole number. */
  varint() {
    const start = this.at;
    let number = 0;
    let scale = 1;
    for (let n = 0; n < 7; n += 1) {
      const byte = this.view.getUint8(this.take(1));
      number += (byte & 127) * scale;
      scale *= 128;
      if (byte < 128) {
        return number;
      }
    }
    this.at = start;
    return this.longVarint();
  }

  /** One that a Number's arithmetic may not hold on the way: negative ones are ten bytes long. */
  longVarint() {
    let number = 0n;
    for (let n = 0n; n < 10n; n += 1n) {
      const byte = this.view.getUint8(this.take(1));
      number |= BigInt(byte & 127) << (7n * n);
      if (byte < 128) {
        return Number(BigInt.asIntN(64, number));
      }
    }
    throw new RangeError("a varint of more than ten bytes");
  }

  float() {
    return this.view.getFloat32(this.take(4), true);
  }

  double() {
    return this.view.getFloat64(this.take(8), true);
  }

  bytes() {
    const length = this.varint();
    const at = this.take(length);
    return this.data.subarray(at, at + length);
  }

  skip(wire) {
    switch (wire) {
      case VARINT:
        this.varint();
        return;
      case FIXED64:
        this.take(8);
        return;
      case LENGTH:
        this.bytes();
        return;
      case FIXED32:
        this.take(4);
        return;
      default:
        throw new RangeError(`wire type ${wire}`);
    }
  }

  take(length) {
    const at = this.at;
    if (!(length >= 0) || at + length > this.data.length) {
      throw new RangeError("the message is cut short");
    }
    this.at += length;
    return at;
  }
}

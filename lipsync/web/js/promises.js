/** A promise and what settles it: `{promise, resolve, reject}`. Nobody has to wait for it. */
export function withResolvers() {
  const parts = {};
  parts.promise = new Promise((resolve, reject) => Object.assign(parts, { resolve, reject }));
  parts.promise.catch(() => {});
  return parts;
}

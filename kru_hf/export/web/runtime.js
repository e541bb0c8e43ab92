// kru_run.c as WebAssembly: one stream of a model. Floats are views of its memory, valid until the next call.
export async function openModel(wasm, weights) {
  const { instance } = await WebAssembly.instantiate(wasm, {});
  const c = instance.exports;
  c._initialize?.();
  const align = (n) => (n + 63) & ~63;
  const file = align(c.__heap_base.value);
  const scratch = file + align(weights.byteLength);
  const room = (end) => {
    const missing = end - c.memory.buffer.byteLength;
    if (missing > 0) c.memory.grow(Math.ceil(missing / 65536));
  };
  room(scratch + 65536);
  new Uint8Array(c.memory.buffer).set(new Uint8Array(weights), file);
  const text = (at, length) => new TextDecoder().decode(new Uint8Array(c.memory.buffer, at, length));
  const wrong = c.kru_check(file, weights.byteLength, scratch);
  if (wrong) {
    const bytes = new Uint8Array(c.memory.buffer);
    throw new Error(text(wrong, bytes.indexOf(0, wrong) - wrong));
  }
  const needed = new Uint32Array(c.memory.buffer, scratch, 1)[0];
  const memory = scratch + 65536;
  room(memory + needed);
  const k = c.kru_open(file, weights.byteLength, memory);
  const inputs = c.kru_inputs(k), outputs = c.kru_outputs(k);
  const seed = scratch + 16, size = scratch + 24, values = scratch + 64;
  const floats = (at, n) => new Float32Array(c.memory.buffer, at, n);
  new BigUint64Array(c.memory.buffer, seed, 1)[0] = BigInt(Date.now());
  return {
    kind: ["text", "sequence", "steps", "roll", "chain"][c.kru_kind(k)],
    inputs, outputs,
    reset: () => c.kru_reset(k),
    seed: (n) => { new BigUint64Array(c.memory.buffer, seed, 1)[0] = BigInt(n); },
    // Reads a text; returns the characters that the model does not know, which it leaves out.
    read(string) {
      const unknown = new Set();
      for (const character of string) {
        const bytes = new TextEncoder().encode(character);
        new Uint8Array(c.memory.buffer, values, bytes.length).set(bytes);
        const token = c.kru_token(k, values, bytes.length, size);
        if (token < 0) unknown.add(character);
        else c.kru_step(k, token);
      }
      return [...unknown];
    },
    // Writes so many tokens and returns their text.
    write(count, temperature, topP) {
      c.kru_generate(k, count, temperature, topP, seed, values);
      return [...new Int32Array(c.memory.buffer, values, count)].map((token) => {
        const at = c.kru_text(k, token, size);
        return text(at, new Int32Array(c.memory.buffer, size, 1)[0]);
      }).join("");
    },
    frame(numbers) {
      floats(values, inputs).set(numbers);
      return floats(c.kru_frame(k, values), outputs);
    },
    // A frame of zeros and ones drawn after the last; it is not read yet.
    draw(temperature, topP, least, most) {
      c.kru_draw(k, temperature, topP, least, most, seed, values);
      return Uint8Array.from(floats(values, inputs));
    },
  };
}

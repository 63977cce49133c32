// @grpc/grpc-js against the server: node calls.mjs PROTO ADDRESS MODEL. Prints what came, as JSON.
import {createRequire} from "node:module";

const require = createRequire(process.env.NODE_MODULES + "/");
const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");

const [proto, address, model] = process.argv.slice(2);
const definition = loader.loadSync(proto, {keepCase: true, defaults: true, enums: String, longs: Number});
const {OptimizedLipSyncService} = grpc.loadPackageDefinition(definition).optimized_lipsyncsrv;
const options = {"grpc.max_receive_message_length": 64 * 1024 * 1024, "grpc.max_send_message_length": 64 * 1024 * 1024};
const client = new OptimizedLipSyncService(address, grpc.credentials.createInsecure(), options);
const zipped = new OptimizedLipSyncService(address, grpc.credentials.createInsecure(), {
  ...options,
  "grpc.default_compression_algorithm": 2,
});
const name = (error) => (error ? grpc.status[error.code] : "OK");
const unary = (method, request, metadata, more, of = client) =>
  new Promise((done) => of[method](request, metadata ?? new grpc.Metadata(), more ?? {}, (error, answer) => done({status: name(error), text: error?.details, answer})));
const count = (list) => list.reduce((counts, key) => ({...counts, [key]: (counts[key] ?? 0) + 1}), {});
const isJpeg = (bytes) => bytes?.length > 100 && bytes[0] === 0xff && bytes[1] === 0xd8;
const out = {};

out.unary = await unary("GenerateInference", {model_name: model, frame_id: 3}).then(
  ({status, answer}) => `${status}${isJpeg(answer?.prediction_data) ? ", a JPEG" : ""}`,
);
const many = await Promise.all(
  Array.from({length: 500}, (_, i) => unary("GenerateInference", {model_name: model, frame_id: i % 10})),
);
out.concurrent = count(many.map(({status, answer}) => (status === "OK" && !answer.success ? answer.error_code : status)));
out.batch = await unary("GenerateBatchInference", {model_name: model, frame_ids: [1, 2, 3]}).then(
  ({status, answer}) => `${status}, ${answer?.responses.filter((each) => isJpeg(each.prediction_data)).length} JPEGs`,
);
out.large = (await unary("GetStats", {model_name: "x".repeat(5_000_000)})).status;
out.gzip = await unary("GenerateInference", {model_name: model, frame_id: 3}, undefined, undefined, zipped).then(({status}) => status);
out.deadline = (await unary("GenerateBatchInference", {model_name: model, frame_ids: Array(100).fill(1)}, undefined, {deadline: Date.now() + 5})).status;
out.nobody = (await unary("GetStats", {model_name: "nobody"})).status;

const stream = (n, cancelAfter) =>
  new Promise((done) => {
    const call = client.StreamInference();
    let frames = 0;
    call.on("data", (answer) => {
      frames += isJpeg(answer.prediction_data) ? 1 : 0;
      if (frames === cancelAfter) call.cancel();
    });
    call.on("error", (error) => done(`${frames} frames, ${name(error)}`));
    call.on("end", () => setImmediate(() => done(`${frames} frames, OK`)));
    for (let i = 0; i < n; i++) call.write({model_name: model, frame_id: i % 10});
    call.end();
  });
out.stream = await stream(100, -1);
out.cancelled = await stream(100, 5);

out.audio = await new Promise((done) => {
  const call = client.StreamAudio();
  let frames = 0;
  call.on("data", (answer) => (frames += answer.event === "AUDIO_EVENT_FRAME" ? 1 : 0));
  call.on("error", (error) => done(`${frames} frames, ${name(error)} ${error.details}`));
  call.on("end", () => setImmediate(() => done(`${frames} frames, OK`)));
  call.write({session: {model_name: model}});
  for (let i = 0; i < 25; i++) call.write({pcm: Buffer.alloc(1280, i)});
  call.end();
});
console.log(JSON.stringify(out));
client.close();
zipped.close();

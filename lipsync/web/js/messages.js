// The messages of api/optimized_lipsyncsrv.proto that the page uses; what they mean is said there.

const int = (number, more = {}) => ({ number, type: "int", ...more });
const bool = (number) => ({ number, type: "bool" });
const float = (number, more = {}) => ({ number, type: "float", ...more });
const string = (number, more = {}) => ({ number, type: "string", ...more });
const bytes = (number, more = {}) => ({ number, type: "bytes", ...more });
const message = (number, of) => ({ number, type: "message", of });

const InferenceRequest = { model_name: string(1), frame_id: int(2), output: int(3), jpeg_quality: int(4) };

const InferenceResponse = {
  success: bool(1),
  frame_id: int(2),
  prediction_data: bytes(3),
  bounds: int(5, { repeated: true }),
  processing_time_ms: float(6),
  prepare_time_ms: float(7),
  inference_time_ms: float(8),
  composite_time_ms: float(9),
  error: string(10),
  error_code: int(12),
  encode_time_ms: float(13),
  queue_time_ms: float(14),
  cached: bool(15),
};

const AudioSession = {
  model_name: string(1),
  start_frame: int(2),
  sample_rate_hz: int(3),
  encoding: int(4),
  output: int(5),
  jpeg_quality: int(6),
  look_ahead_ms: float(7, { optional: true }),
  rest_after_s: float(8, { optional: true }),
  quiet_dbfs: float(9, { optional: true }),
};

/** One of these fields alone. */
const AudioRequest = {
  session: message(1, AudioSession),
  pcm: bytes(2, { optional: true }),
  flush: message(3, {}),
  interrupt: message(4, { dropped_samples: int(1) }),
};

const AudioFrame = {
  event: int(1),
  frame: message(2, InferenceResponse),
  first_sample: int(3),
  end_sample: int(4),
  next_frame: int(5),
  rest: float(6),
  frame_count: int(7),
  max_samples_ahead: int(8),
};

/** `AudioFrame.event` */
export const AudioEvent = { FRAME: 0, STARTED: 1, SILENCE: 2, INTERRUPTED: 3, END: 4 };

const VideoFrameRequest = { model_name: string(1), frame_id: int(2), video_type: string(3) };
const VideoFrameResponse = { success: bool(1), frame_data: bytes(2), frame_id: int(3), error: string(5) };

const ModelMetadataRequest = { model_name: string(1) };
const ModelMetadataResponse = {
  success: bool(1),
  model_name: string(2),
  frame_count: int(3),
  error: string(7),
  width: int(8),
  height: int(9),
  fps: float(10),
  device: string(11),
  version: string(14),
};

const ListModelsResponse = { loaded_models: string(1, { repeated: true }), count: int(2) };
const HealthResponse = { healthy: bool(1), status: string(2), loaded_models: int(3), uptime_seconds: int(4) };

/** What goes around calls on a WebSocket. */
export const WebCallOptions = {
  timeout_ms: int(1),
  window: int(2),
  complete: bool(3),
  request_id: string(4),
  traceparent: string(5),
};
export const WebTaken = { count: int(1) };
export const WebMissed = { count: int(1) };
export const WebCallEnd = {
  status: int(1),
  message: string(2),
  reason: string(3),
  fields: { number: 4, type: "map" },
  retry_after_ms: int(5, { optional: true }),
  request_id: string(6),
};

/** The methods that the page calls: the tag of their messages on a WebSocket, request and answer. */
export const METHODS = {
  StreamInference: { tag: 3, request: InferenceRequest, answer: InferenceResponse },
  StreamAudio: { tag: 4, request: AudioRequest, answer: AudioFrame },
  GetModelMetadata: { tag: 8, request: ModelMetadataRequest, answer: ModelMetadataResponse },
  ListModels: { tag: 10, request: {}, answer: ListModelsResponse },
  HealthCheck: { tag: 11, request: {}, answer: HealthResponse },
  GetVideoFrame: { tag: 12, request: VideoFrameRequest, answer: VideoFrameResponse },
};

/** Other tags, in either direction. */
export const TAG = { OPTIONS: 100, FINISH: 101, CANCEL: 102, TAKEN: 103, END: 110, MISSED: 111 };

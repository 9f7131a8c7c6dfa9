/* A double of the CUDA driver for machines without one: the calls that lance_artifact makes, over host memory.
 *
 * Work on a stream is put off until somebody waits for it, in the order that streams and events allow and no earlier. A
 * missing wait therefore shows as stale data, on every run. Memory is poisoned when it is allocated; what is not released
 * can be counted; calls can be made to fail.
 *
 * Signatures and codes: https://docs.nvidia.com/cuda/cuda-driver-api/
 */
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef int CUresult;
typedef int CUdevice;
typedef unsigned long long CUdeviceptr;
typedef struct context *CUcontext;
typedef struct stream *CUstream;
typedef struct event *CUevent;

enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, NO_DEVICE = 100, INVALID_DEVICE = 101,
       INVALID_CONTEXT = 201, NOT_READY = 600, LAUNCH_FAILED = 719 };

enum kind { COPY, RECORD, WAIT, COMPUTED, POISON };

struct operation {
  enum kind kind;
  void *target;
  const void *source;
  size_t bytes;
  struct event *event;
  unsigned long generation;
  /* Of what was computed: what it was computed from, as it was then. */
  const unsigned char *input;
  size_t input_bytes;
  uint64_t input_hash;
  struct operation *next;
};

struct stream { struct operation *first, *last; };
/* `recorded`: how often it was put on a stream; `done`: up to which of these the stream has come. */
struct event { struct stream *stream; unsigned long recorded, done; };
struct context { int references; };
struct allocation { void *memory; size_t bytes; struct allocation *next; };

#define MOST_DEVICES 8
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct context contexts[MOST_DEVICES];
static int generations[MOST_DEVICES];
static __thread CUcontext current;
static int initialised, devices;
static size_t total_memory = (size_t)1 << 30, used_memory;
static struct allocation *allocations;
static long live;
static const char *failing_call;
static int failing_after, failing_code, lost, copies_in = 1;
/* Allocations in the order of the default stream, for which no other waits: they are poisoned when it comes to them. */
static struct stream default_stream;

/* ---- For tests: how many devices there are and how much memory each has; what is not released; which call fails. */

void fake_cuda_reset(int count, size_t memory) {
  devices = count;
  total_memory = memory;
  failing_call = NULL;
  lost = 0;
}

/* For measurements of the rest: 0 lets copies to the device take no time, and copy nothing. */
void fake_cuda_copies_in(int do_them) { copies_in = do_them; }

/* For programs that are no tests: so many devices from the start, with so much memory. */
__attribute__((constructor)) static void from_environment(void) {
  const char *count = getenv("FAKE_CUDA_DEVICES");
  if (count) devices = atoi(count);
  const char *memory = getenv("FAKE_CUDA_MEMORY");
  if (memory) total_memory = strtoull(memory, NULL, 10);
}

/* How often a device's context was destroyed: what was made in an earlier one is gone. */
long fake_cuda_generation(int device) { return generations[device]; }

long fake_cuda_live(void) {
  long references = 0;
  for (int i = 0; i < MOST_DEVICES; i++) references += contexts[i].references;
  return live + references;
}

/* The call named `call` fails with `code`, from its `after`th time on. `call` must stay valid. Out of memory passes; any other
 * error is a device that is lost: nothing runs on it any more, and every call fails as this one did. */
void fake_cuda_fail(const char *call, int after, int code) {
  failing_call = call;
  failing_after = after;
  failing_code = code;
}

static int fails(const char *call) {
  if (lost) return lost;
  if (!failing_call || strcmp(failing_call, call)) return SUCCESS;
  if (failing_after > 0) {
    failing_after--;
    return SUCCESS;
  }
  if (failing_code != OUT_OF_MEMORY) lost = failing_code;
  return failing_code;
}

#define ENTER(call)                     \
  pthread_mutex_lock(&lock);            \
  int status = fails(call);             \
  if (!status && !initialised) status = NOT_INITIALIZED;
#define IN_CONTEXT(call)                \
  ENTER(call)                           \
  if (!status && (!current || !current->references)) status = INVALID_CONTEXT;
#define LEAVE                           \
  pthread_mutex_unlock(&lock);          \
  return status;

/* ---- Streams and events. */

static int event_up_to(struct event *event, unsigned long generation);

static uint64_t hash(const unsigned char *bytes, size_t count) {
  uint64_t found = 14695981039346656037u;
  for (size_t i = 0; i < count; i++) found = (found ^ bytes[i]) * 1099511628211u;
  return found;
}

static int run_first(struct stream *stream) {
  struct operation *operation = stream->first;
  int status = SUCCESS;
  if (operation->kind == WAIT) status = event_up_to(operation->event, operation->generation);
  if (operation->kind == COPY && !lost) memcpy(operation->target, operation->source, operation->bytes);
  if (operation->kind == RECORD) operation->event->done = operation->generation;
  if (operation->kind == POISON && !lost) memset(operation->target, 0xA5, operation->bytes);
  if (operation->kind == COMPUTED) {
    /* Somebody wrote to the input before the stream came here, or freed it: what was computed from it is not what there would be. */
    if (!lost && hash(operation->input, operation->input_bytes) == operation->input_hash)
      memcpy(operation->target, operation->source, operation->bytes);
    free((void *)operation->source);
  }
  stream->first = operation->next;
  if (!stream->first) stream->last = NULL;
  free(operation);
  return status;
}

static int drain(struct stream *stream) {
  int status = SUCCESS;
  while (stream->first && (!status || lost)) status = run_first(stream);
  return status;
}

/* As late as it may be: after whatever else is waited for. */
static int drain_default(int status) {
  drain(&default_stream);
  return status;
}

static int event_up_to(struct event *event, unsigned long generation) {
  int status = SUCCESS;
  while (event->done < generation && event->stream && event->stream->first && (!status || lost)) status = run_first(event->stream);
  return status;
}

static struct operation *put(struct stream *stream, enum kind kind) {
  struct operation *operation = calloc(1, sizeof *operation);
  operation->kind = kind;
  if (stream->last) stream->last->next = operation;
  else stream->first = operation;
  stream->last = operation;
  return operation;
}

static void put_copy(struct stream *stream, void *target, const void *source, size_t bytes) {
  struct operation *operation = put(stream, COPY);
  operation->target = target;
  operation->source = source;
  operation->bytes = bytes;
}

/* For the double of cuVS: `target` becomes `source` when the stream comes here, unless the `input` is another by then. */
void fake_cuda_computed(CUstream stream, void *target, const void *source, size_t bytes, const void *input, size_t input_bytes) {
  pthread_mutex_lock(&lock);
  memset(target, 0xA5, bytes);
  struct operation *operation = put(stream, COMPUTED);
  operation->target = target;
  operation->source = memcpy(malloc(bytes), source, bytes);
  operation->bytes = bytes;
  operation->input = input;
  operation->input_bytes = input_bytes;
  operation->input_hash = hash(input, input_bytes);
  pthread_mutex_unlock(&lock);
}

/* Memory that is there when the default stream comes here. */
void fake_cuda_allocated(void *target, size_t bytes) {
  pthread_mutex_lock(&lock);
  struct operation *operation = put(&default_stream, POISON);
  operation->target = target;
  operation->bytes = bytes;
  pthread_mutex_unlock(&lock);
}

/* ---- The driver. */

CUresult cuInit(unsigned flags) {
  pthread_mutex_lock(&lock);
  int status = flags ? INVALID_VALUE : fails("cuInit");
  if (!status && !devices) status = NO_DEVICE;
  if (!status) initialised = 1;
  LEAVE
}

CUresult cuDriverGetVersion(int *version) {
  *version = 13000;
  return SUCCESS;
}

CUresult cuDeviceGetCount(int *count) {
  ENTER("cuDeviceGetCount")
  if (!status) *count = devices;
  LEAVE
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  ENTER("cuDeviceGet")
  if (!status && (ordinal < 0 || ordinal >= devices)) status = INVALID_DEVICE;
  if (!status) *device = ordinal;
  LEAVE
}

CUresult cuDeviceGetName(char *name, int length, CUdevice device) {
  ENTER("cuDeviceGetName")
  if (!status) {
    strncpy(name, device ? "Double B" : "Double A", length - 1);
    name[length - 1] = 0;
  }
  LEAVE
}

CUresult cuDeviceGetAttribute(int *value, int attribute, CUdevice device) {
  ENTER("cuDeviceGetAttribute")
  if (!status && (device < 0 || device >= devices)) status = INVALID_DEVICE;
  /* 75 and 76: compute capability, major and minor */
  if (!status) *value = attribute == 75 ? 9 : 0;
  LEAVE
}

CUresult cuDeviceTotalMem_v2(size_t *bytes, CUdevice device) {
  ENTER("cuDeviceTotalMem_v2")
  if (!status && (device < 0 || device >= devices)) status = INVALID_DEVICE;
  if (!status) *bytes = total_memory;
  LEAVE
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  ENTER("cuDevicePrimaryCtxRetain")
  if (!status && (device < 0 || device >= devices)) status = INVALID_DEVICE;
  if (!status) {
    contexts[device].references++;
    *context = &contexts[device];
  }
  LEAVE
}

CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) {
  ENTER("cuDevicePrimaryCtxRelease_v2")
  if (!status && !contexts[device].references) status = INVALID_CONTEXT;
  if (!status || lost) {
    contexts[device].references--;
    if (!contexts[device].references) generations[device]++;
  }
  LEAVE
}

CUresult cuCtxSetCurrent(CUcontext context) {
  ENTER("cuCtxSetCurrent")
  if (!status) current = context;
  LEAVE
}

CUresult cuCtxGetCurrent(CUcontext *context) {
  ENTER("cuCtxGetCurrent")
  if (!status) *context = current;
  LEAVE
}

CUresult cuCtxGetDevice(CUdevice *device) {
  IN_CONTEXT("cuCtxGetDevice")
  if (!status) *device = (CUdevice)(current - contexts);
  LEAVE
}

CUresult cuCtxSynchronize(void) {
  IN_CONTEXT("cuCtxSynchronize")
  if (!status) status = drain(&default_stream);
  LEAVE
}

CUresult cuMemGetInfo_v2(size_t *available, size_t *total) {
  IN_CONTEXT("cuMemGetInfo_v2")
  if (!status) {
    *available = total_memory - used_memory;
    *total = total_memory;
  }
  LEAVE
}

CUresult cuMemAlloc_v2(CUdeviceptr *pointer, size_t bytes) {
  IN_CONTEXT("cuMemAlloc_v2")
  if (!status && !bytes) status = INVALID_VALUE;
  if (!status && bytes > total_memory - used_memory) status = OUT_OF_MEMORY;
  if (!status) {
    struct allocation *allocation = malloc(sizeof *allocation);
    allocation->memory = aligned_alloc(256, (bytes + 255) / 256 * 256);
    allocation->bytes = bytes;
    allocation->next = allocations;
    allocations = allocation;
    memset(allocation->memory, 0xA5, bytes);
    used_memory += bytes;
    live++;
    *pointer = (CUdeviceptr)(uintptr_t)allocation->memory;
  }
  LEAVE
}

CUresult cuMemFree_v2(CUdeviceptr pointer) {
  IN_CONTEXT("cuMemFree_v2")
  drain(&default_stream);
  struct allocation **place = &allocations;
  while (*place && (*place)->memory != (void *)(uintptr_t)pointer) place = &(*place)->next;
  if (!status && !*place) status = INVALID_VALUE;
  if ((!status || lost) && *place) {
    struct allocation *found = *place;
    *place = found->next;
    used_memory -= found->bytes;
    memset(found->memory, 0x5A, found->bytes);
    free(found->memory);
    free(found);
    live--;
  }
  LEAVE
}

CUresult cuMemHostAlloc(void **pointer, size_t bytes, unsigned flags) {
  IN_CONTEXT("cuMemHostAlloc")
  if (!status && (!bytes || flags > 7)) status = INVALID_VALUE;
  if (!status) {
    *pointer = aligned_alloc(256, (bytes + 255) / 256 * 256);
    memset(*pointer, 0xA5, bytes);
    live++;
  }
  LEAVE
}

CUresult cuMemFreeHost(void *pointer) {
  IN_CONTEXT("cuMemFreeHost")
  if (!status || lost) {
    free(pointer);
    live--;
  }
  LEAVE
}

CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr target, const void *source, size_t bytes, CUstream stream) {
  IN_CONTEXT("cuMemcpyHtoDAsync_v2")
  if (!status && copies_in) put_copy(stream, (void *)(uintptr_t)target, source, bytes);
  LEAVE
}

CUresult cuMemcpyDtoHAsync_v2(void *target, CUdeviceptr source, size_t bytes, CUstream stream) {
  IN_CONTEXT("cuMemcpyDtoHAsync_v2")
  if (!status) put_copy(stream, target, (const void *)(uintptr_t)source, bytes);
  LEAVE
}

CUresult cuStreamCreate(CUstream *stream, unsigned flags) {
  IN_CONTEXT("cuStreamCreate")
  if (!status && flags > 1) status = INVALID_VALUE;
  if (!status) {
    *stream = calloc(1, sizeof **stream);
    live++;
  }
  LEAVE
}

CUresult cuStreamSynchronize(CUstream stream) {
  IN_CONTEXT("cuStreamSynchronize")
  if (!status) status = drain_default(drain(stream));
  LEAVE
}

CUresult cuStreamWaitEvent(CUstream stream, CUevent event, unsigned flags) {
  IN_CONTEXT("cuStreamWaitEvent")
  if (!status && flags) status = INVALID_VALUE;
  if (!status) {
    struct operation *operation = put(stream, WAIT);
    operation->event = event;
    operation->generation = event->recorded;
  }
  LEAVE
}

CUresult cuStreamDestroy_v2(CUstream stream) {
  IN_CONTEXT("cuStreamDestroy_v2")
  if (!status || lost) {
    drain(stream);
    /* Not freed, nor are events: others may still refer to them, as the driver allows. */
    live--;
  }
  LEAVE
}

CUresult cuEventCreate(CUevent *event, unsigned flags) {
  IN_CONTEXT("cuEventCreate")
  if (!status && flags > 7) status = INVALID_VALUE;
  if (!status) {
    *event = calloc(1, sizeof **event);
    live++;
  }
  LEAVE
}

CUresult cuEventRecord(CUevent event, CUstream stream) {
  IN_CONTEXT("cuEventRecord")
  if (!status) {
    struct operation *operation = put(stream, RECORD);
    operation->event = event;
    operation->generation = ++event->recorded;
    event->stream = stream;
  }
  LEAVE
}

CUresult cuEventSynchronize(CUevent event) {
  IN_CONTEXT("cuEventSynchronize")
  if (!status) status = drain_default(event_up_to(event, event->recorded));
  LEAVE
}

CUresult cuEventElapsedTime(float *milliseconds, CUevent start, CUevent end) {
  IN_CONTEXT("cuEventElapsedTime")
  if (!status && (start->done < start->recorded || end->done < end->recorded)) status = NOT_READY;
  if (!status) *milliseconds = 1.0f;
  LEAVE
}

CUresult cuEventDestroy_v2(CUevent event) {
  IN_CONTEXT("cuEventDestroy_v2")
  if (!status || lost) {
    if (event->stream && event->done < event->recorded) event_up_to(event, event->recorded);
    live--;
  }
  LEAVE
}

CUresult cuGetErrorName(CUresult error, const char **name) {
  *name = error == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : error == LAUNCH_FAILED ? "CUDA_ERROR_LAUNCH_FAILED"
        : error == INVALID_CONTEXT ? "CUDA_ERROR_INVALID_CONTEXT" : "CUDA_ERROR_OTHER";
  return SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = error == OUT_OF_MEMORY ? "out of memory" : error == LAUNCH_FAILED ? "unspecified launch failure" : "some error";
  return SUCCESS;
}

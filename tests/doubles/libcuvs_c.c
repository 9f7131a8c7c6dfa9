/* A double of the part of cuVS's C interface that lance_artifact calls, over the double of the driver.
 * https://docs.rapids.ai/api/cuvs/stable/c_api/core_c_api/ */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef enum { CUVS_ERROR = 0, CUVS_SUCCESS = 1 } cuvsError_t;
typedef uintptr_t cuvsResources_t;
typedef void *cudaStream_t;

cuvsError_t cuvsResourcesCreate(cuvsResources_t *resources) {
  cudaStream_t *made = malloc(sizeof *made);
  /* The per-thread default stream. */
  *made = (cudaStream_t)2;
  *resources = (cuvsResources_t)made;
  return CUVS_SUCCESS;
}

cuvsError_t cuvsResourcesDestroy(cuvsResources_t resources) {
  free((void *)resources);
  return CUVS_SUCCESS;
}

cuvsError_t cuvsStreamSet(cuvsResources_t resources, cudaStream_t stream) {
  *(cudaStream_t *)resources = stream;
  return CUVS_SUCCESS;
}

cuvsError_t cuvsStreamGet(cuvsResources_t resources, cudaStream_t *stream) {
  *stream = *(cudaStream_t *)resources;
  return CUVS_SUCCESS;
}

/* The arithmetic is the Python double's. It is called from here without the interpreter, as the real one computes: whoever holds the
 * interpreter during a call keeps the others out, which `fake_cuvs_most_at_once` shows. */
typedef struct DLManagedTensor DLManagedTensor;
typedef struct { uintptr_t addr; uint8_t code, bits; uint16_t lanes; } cuvsIvfPqIndex;
typedef int (*build_fn)(uintptr_t, uintptr_t, uint32_t, DLManagedTensor *, DLManagedTensor *, DLManagedTensor *, DLManagedTensor *,
                        cuvsIvfPqIndex *);
typedef int (*transform_fn)(uintptr_t, cuvsIvfPqIndex *, DLManagedTensor *, DLManagedTensor *, DLManagedTensor *);
typedef void (*destroy_fn)(uintptr_t);

static build_fn build;
static transform_fn transform;
static destroy_fn destroy;
static __thread char error_text[512];
static int now, most, wait_ms, entered;

void fake_cuvs_arithmetic(build_fn b, transform_fn t, destroy_fn d) { build = b; transform = t; destroy = d; }

void fake_cuvs_fail(const char *text) {
  strncpy(error_text, text, sizeof error_text - 1);
}

/* Calls wait so long for others before they compute. */
void fake_cuvs_wait(int milliseconds) { wait_ms = milliseconds; most = 0; }

/* Calls that came this far, whether or not they got the interpreter, which the arithmetic needs. */
int fake_cuvs_entered(void) { return entered; }

int fake_cuvs_most_at_once(void) { return most; }

const char *cuvsGetLastErrorText(void) { return error_text; }

cuvsError_t cuvsIvfPqIndexCreate(cuvsIvfPqIndex **index) {
  *index = calloc(1, sizeof **index);
  return CUVS_SUCCESS;
}

cuvsError_t cuvsIvfPqIndexDestroy(cuvsIvfPqIndex *index) {
  if (index->addr) destroy(index->addr);
  free(index);
  return CUVS_SUCCESS;
}

cuvsError_t cuvsIvfPqBuildPrecomputed(cuvsResources_t resources, uintptr_t params, uint32_t dim, DLManagedTensor *pq_centers,
                                      DLManagedTensor *centers, DLManagedTensor *centers_rot, DLManagedTensor *rotation,
                                      cuvsIvfPqIndex *index) {
  return build(resources, params, dim, pq_centers, centers, centers_rot, rotation, index) ? CUVS_SUCCESS : CUVS_ERROR;
}

cuvsError_t cuvsIvfPqTransform(cuvsResources_t resources, cuvsIvfPqIndex *index, DLManagedTensor *vectors, DLManagedTensor *labels,
                               DLManagedTensor *codes) {
  __atomic_add_fetch(&entered, 1, __ATOMIC_SEQ_CST);
  int at_once = __atomic_add_fetch(&now, 1, __ATOMIC_SEQ_CST), before = __atomic_load_n(&most, __ATOMIC_SEQ_CST);
  while (at_once > before && !__atomic_compare_exchange_n(&most, &before, at_once, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {}
  if (wait_ms) {
    struct timespec wait = {wait_ms / 1000, (wait_ms % 1000) * 1000000L};
    nanosleep(&wait, NULL);
  }
  int done = transform(resources, index, vectors, labels, codes);
  __atomic_sub_fetch(&now, 1, __ATOMIC_SEQ_CST);
  return done ? CUVS_SUCCESS : CUVS_ERROR;
}

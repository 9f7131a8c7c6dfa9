/* A double of the part of cuVS's C interface that lance_artifact calls, over the double of the driver.
 * https://docs.rapids.ai/api/cuvs/stable/c_api/core_c_api/ */
#include <stdint.h>
#include <stdlib.h>

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

/* FAKE CUDA runtime (see tests/fakes/README.md): the "GPU's" memory is the heap, one device of compute capability 8.7.
   FAKE_GPUS=0 is a machine without one; memory above FAKE_GPU_BYTES cannot be had. */
#include <stdlib.h>
#include <string.h>

int cudaGetDeviceCount(int *count) {
  const char *given = getenv("FAKE_GPUS");
  *count = given ? atoi(given) : 1;
  return *count ? 0 : 100;
}
int cudaStreamCreate(void **stream) { return (*stream = malloc(1)) == NULL; }
int cudaStreamDestroy(void *stream) { free(stream); return 0; }
int cudaStreamSynchronize(void *stream) { return stream == NULL; }
int cudaMalloc(void **pointer, size_t size) {
  const char *given = getenv("FAKE_GPU_BYTES");
  if (given && size > strtoul(given, NULL, 10)) return 2;
  return (*pointer = malloc(size)) == NULL;
}
int cudaFree(void *pointer) { free(pointer); return 0; }
int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *stream) {
  (void)kind;
  memcpy(to, from, size);
  return stream == NULL;
}
int cudaDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == 75 ? 8 : attribute == 76 ? 7 : -1;
  return device != 0;
}
const char *cudaGetErrorString(int status) {
  return status == 2 ? "out of memory" : status == 100 ? "no CUDA-capable device is detected" : "fake error";
}

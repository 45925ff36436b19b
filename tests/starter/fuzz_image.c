/*
 * Hostile images for the C that looks into them: where a SIF's root file system begins, and which
 * parts of a program the loader will touch.  Neither runs with privilege, but both run for all.
 */
#include <sys/mman.h>

#include "../../starter/prefetch.c"
#include "../../starter/probe.c"

#include "fuzz.h"

enum { IMAGE_BYTES = 16384 };
static unsigned char program[IMAGE_BYTES];
static size_t program_bytes;
static uint64_t accepted;

static int file_with(const void *data, size_t size) {
    int fd = memfd_create("image", MFD_CLOEXEC);
    must(fd >= 0 && write(fd, data, size) == (ssize_t)size, "there is a file");
    return fd;
}

static void put_number(unsigned char *at, uint64_t number, int bytes) {
    for (int i = 0; i < bytes; i++)
        at[i] = (unsigned char)(number >> (8 * i));
}

static size_t compose_sif(unsigned char *data) {
    uint32_t count = dice(4);
    size_t size = 4096 + count * DESCRIPTOR_BYTES + dice(2048);
    memset(data, 0, size);
    memcpy(data + 32, "SIF_MAGIC", 10);
    put_number(data + 88, count, 8);
    put_number(data + 96, 4096, 8);
    for (uint32_t i = 0; i < count; i++) {
        unsigned char *d = data + 4096 + i * DESCRIPTOR_BYTES;
        put_number(d, DATA_PARTITION, 4);
        d[4] = (unsigned char)dice(2);
        put_number(d + 17, dice(8192), 8);
        put_number(d + 201, dice(3), 4);
        put_number(d + 205, dice(3), 4);
    }
    for (uint32_t n = dice(6); n > 0; n--)
        mutate(data + (dice(2) ? 0 : 4096), dice(2) ? 128 : size - 4096);
    return dice(16) == 0 ? dice((uint32_t)size) : size;
}

static void look_for_root(void) {
    static unsigned char data[IMAGE_BYTES];
    struct probe found;
    size_t size = compose_sif(data);
    int fd = file_with(data, size);
    if (probe_image(fd, &found) == 0) {
        accepted++;
        must(found.offset < size, "the root file system begins inside the image");
    }
    close(fd);
}

static void look_into_program(void) {
    static unsigned char data[IMAGE_BYTES];
    struct wanted w;
    memset(&w, 0, sizeof(w));
    memcpy(data, program, program_bytes);
    for (uint32_t n = dice(8); n > 0; n--)
        mutate(data, dice(3) == 0 ? program_bytes : 1024);
    int fd = file_with(data, dice(16) == 0 ? dice((uint32_t)program_bytes) : program_bytes);
    prefetch_file(fd, &w);
    close(fd);
    must(w.count <= MOST_LIBRARIES, "the list has an end");
    for (size_t i = 0; i < w.count; i++)
        must(w.names[i][0] && strnlen(w.names[i], NAME_BYTES) < NAME_BYTES, "a name has an end");
    accepted += w.count > 0;
}

static void once(void) {
    if (dice(2) == 0)
        look_for_root();
    else
        look_into_program();
}

int main(int argc, char **argv) {
    FILE *file = fopen("/bin/true", "rb");
    must(file != NULL, "there is a program to begin with");
    program_bytes = fread(program, 1, sizeof(program), file);
    fclose(file);
    fuzz_main(argc, argv, once, &accepted);
    return 0;
}

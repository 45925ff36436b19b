/* Where the root file system begins in an image.  A guess made without any privilege: stage 1
 * judges the image, and what it finds must agree. */
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "starter.h"

/* SIF: 128 bytes of header, descriptors of 585 bytes; all numbers little-endian and unaligned. */
enum { HEADER_BYTES = 128, DESCRIPTOR_BYTES = 585, MOST_DESCRIPTORS = 256 };
enum { DATA_PARTITION = 0x4004, FS_SQUASHFS = 1, PART_PRIMARY = 2 };

static uint64_t number_at(const unsigned char *at, int bytes) {
    uint64_t number = 0;
    for (int i = bytes; i-- > 0;)
        number = number << 8 | at[i];
    return number;
}

static int probe_sif(int fd, const unsigned char *header, uint64_t size, uint64_t *offset) {
    uint64_t count = number_at(header + 88, 8), at = number_at(header + 96, 8);
    if (count > MOST_DESCRIPTORS || at > size)
        return -1;
    for (uint64_t i = 0; i < count; i++) {
        unsigned char d[DESCRIPTOR_BYTES];
        if (pread(fd, d, sizeof(d), (off_t)(at + i * DESCRIPTOR_BYTES)) != (ssize_t)sizeof(d))
            return -1;
        if (number_at(d, 4) != DATA_PARTITION || !d[4] || number_at(d + 201, 4) != FS_SQUASHFS ||
            number_at(d + 205, 4) != PART_PRIMARY)
            continue;
        *offset = number_at(d + 17, 8);
        return *offset < size ? 0 : -1;
    }
    return -1;
}

int probe_image(int fd, struct probe *found) {
    unsigned char header[HEADER_BYTES];
    struct stat st;
    if (fstat(fd, &st) < 0 || !S_ISREG(st.st_mode) ||
        pread(fd, header, sizeof(header), 0) != (ssize_t)sizeof(header))
        return -1;
    *found = (struct probe){.dev = st.st_dev, .ino = st.st_ino};
    if (memcmp(header, "hsqs", 4) == 0)
        return 0;
    if (memcmp(header + 32, "SIF_MAGIC", 10) != 0)
        return -1;
    return probe_sif(fd, header, (uint64_t)st.st_size, &found->offset);
}

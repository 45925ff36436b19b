/* Reads ahead what a launch and the loader of its program will touch, so that the image server
 * unpacks while the interpreters still start.  No privilege; what is odd is not read ahead. */
#include <dirent.h>
#include <elf.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "starter.h"

enum { MOST_SEGMENTS = 32, MOST_LIBRARIES = 8, NAME_BYTES = 256, STRINGS_BYTES = 4096,
       READ_MOST = 2 << 20, BLOCK_BYTES = 128 << 10 };

#if defined(__x86_64__)
#define TRIPLET "x86_64-linux-gnu"
#elif defined(__aarch64__)
#define TRIPLET "aarch64-linux-gnu"
#elif defined(__powerpc64__)
#define TRIPLET "powerpc64le-linux-gnu"
#else
#define TRIPLET "."
#endif

static const char *const program_directories[] = {"usr/local/bin/", "usr/bin/", "bin/", "sbin/",
                                                  "usr/sbin/"};
static const char *const library_directories[] = {
    ".singularity.d/libs/", "lib/" TRIPLET "/", "usr/lib/" TRIPLET "/",
    "lib64/", "usr/lib64/", "lib/", "usr/lib/"};

struct wanted {
    char names[MOST_LIBRARIES][NAME_BYTES];
    size_t count;
};

static int open_inside(int root, const char *path) {
    struct open_how how = {.flags = O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY,
                           .resolve = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS};
    return (int)syscall(SYS_openat2, root, path, &how, sizeof(how));
}

static int open_in_any(int root, const char *const *directories, size_t count, const char *name) {
    if (strchr(name, '/'))
        return open_inside(root, name);
    for (size_t i = 0; i < count; i++) {
        char path[NAME_BYTES + 64] = "";
        append_text(path, sizeof(path), directories[i]);
        append_text(path, sizeof(path), name);
        int fd = open_inside(root, path);
        if (fd >= 0)
            return fd;
    }
    return -1;
}

/* In order and in the image's whole blocks, of which the image server keeps one: a page fault's
 * window lies across two of them, and a part of one has it unpacked again for the rest.  Not waited
 * for: who needs a page waits for that page. */
static void read_blocks(int fd, uint64_t offset, uint64_t size) {
    uint64_t end = offset + (size > READ_MOST ? READ_MOST : size);
    for (offset &= ~(uint64_t)(BLOCK_BYTES - 1); offset < end; offset += BLOCK_BYTES)
        if (readahead(fd, (off_t)offset, BLOCK_BYTES) < 0)
            return;
}

static uint64_t file_offset(const Elf64_Phdr *segments, size_t count, uint64_t address) {
    for (size_t i = 0; i < count; i++)
        if (segments[i].p_type == PT_LOAD && address >= segments[i].p_vaddr &&
            address - segments[i].p_vaddr < segments[i].p_filesz)
            return address - segments[i].p_vaddr + segments[i].p_offset;
    return 0;
}

static void want(struct wanted *w, const char *name, size_t most) {
    size_t length = strnlen(name, most);
    if (w->count == MOST_LIBRARIES || length == 0 || length >= NAME_BYTES || length == most)
        return;
    for (size_t i = 0; i < w->count; i++)
        if (strcmp(w->names[i], name) == 0)
            return;
    memcpy(w->names[w->count++], name, length + 1);
}

static void want_needed(int fd, const Elf64_Phdr *segments, size_t count, const Elf64_Phdr *dynamic,
                        struct wanted *w) {
    Elf64_Dyn entries[128];
    static char strings[STRINGS_BYTES];
    ssize_t got = pread(fd, entries, sizeof(entries), (off_t)dynamic->p_offset);
    size_t rows = got < 0 ? 0 : (size_t)got / sizeof(entries[0]);
    uint64_t table = 0;
    for (size_t i = 0; i < rows && entries[i].d_tag != DT_NULL; i++)
        if (entries[i].d_tag == DT_STRTAB)
            table = file_offset(segments, count, entries[i].d_un.d_ptr);
    if (table == 0)
        return;
    for (size_t i = 0; i < rows && entries[i].d_tag != DT_NULL; i++) {
        if (entries[i].d_tag != DT_NEEDED)
            continue;
        got = pread(fd, strings, NAME_BYTES, (off_t)(table + entries[i].d_un.d_val));
        if (got > 0)
            want(w, strings, (size_t)got);
    }
}

static void prefetch_file(int fd, struct wanted *w) {
    Elf64_Ehdr head;
    Elf64_Phdr segments[MOST_SEGMENTS];
    struct stat st;
    /* Else the kernel reads ahead of each read, across the blocks. */
    if (fstat(fd, &st) < 0 || !S_ISREG(st.st_mode) ||
        posix_fadvise(fd, 0, 0, POSIX_FADV_RANDOM) != 0)
        return;
    read_blocks(fd, 0, sizeof(head));
    if (pread(fd, &head, sizeof(head), 0) != (ssize_t)sizeof(head) ||
        memcmp(head.e_ident, ELFMAG, SELFMAG) != 0 || head.e_ident[EI_CLASS] != ELFCLASS64 ||
        head.e_phentsize != sizeof(segments[0]) || head.e_phnum > MOST_SEGMENTS)
        return;
    size_t size = head.e_phnum * sizeof(segments[0]);
    if (pread(fd, segments, size, (off_t)head.e_phoff) != (ssize_t)size)
        return;
    for (size_t i = 0; i < head.e_phnum; i++)
        if (segments[i].p_type == PT_LOAD)
            read_blocks(fd, segments[i].p_offset, segments[i].p_filesz);
    for (size_t i = 0; i < head.e_phnum; i++) {
        const Elf64_Phdr *s = &segments[i];
        char name[NAME_BYTES];
        if (s->p_type == PT_DYNAMIC)
            want_needed(fd, segments, head.e_phnum, s, w);
        if (s->p_type == PT_INTERP && s->p_filesz < sizeof(name) &&
            pread(fd, name, s->p_filesz, (off_t)s->p_offset) == (ssize_t)s->p_filesz)
            want(w, name, s->p_filesz);
    }
}

/* What every launch looks at before its payload starts: names first, as each is one question to
 * the image server that would wait behind a block's unpacking. */
static void prefetch_names(int root) {
    static const char *const names[] = {
        "etc/resolv.conf", "etc/hosts", "etc/localtime", "proc", "sys", "dev", "tmp", "var/tmp",
        "home", "root", "bin/sh", ".singularity.d/runscript", "usr/sbin", "etc/ld.so.preload",
        ".singularity.d/libs/glibc-hwcaps", ".singularity.d/libs/tls",
        ".singularity.d/libs/x86_64"};
    static const char *const files[] = {"etc/passwd", "etc/group", "etc/ld.so.cache"};
    static char content[BLOCK_BYTES];
    int fd;
    for (size_t i = 0; i < ARRAY_SIZE(names); i++) {
        struct open_how how = {.flags = O_PATH | O_CLOEXEC,
                               .resolve = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS};
        fd = (int)syscall(SYS_openat2, root, names[i], &how, sizeof(how));
        if (fd >= 0)
            close(fd);
    }
    for (size_t i = 0; i < ARRAY_SIZE(files); i++)
        if ((fd = open_inside(root, files[i])) >= 0) {
            (void)!pread(fd, content, sizeof(content), 0);
            close(fd);
        }
    fd = open_inside(root, ".singularity.d/env");
    DIR *d = fd >= 0 ? fdopendir(fd) : NULL;
    const struct dirent *e;
    for (int n = 0; d && n < 32 && (e = readdir(d)) != NULL; n++) {
        char path[NAME_BYTES + 32] = ".singularity.d/env/";
        if (e->d_name[0] == '.')
            continue;
        append_text(path, sizeof(path), e->d_name);
        if ((fd = open_inside(root, path)) >= 0) {
            (void)!pread(fd, content, sizeof(content), 0);
            close(fd);
        }
    }
}

void prefetch_program(int root_fd, const char *name) {
    static struct wanted w;
    prefetch_names(root_fd);
    int fd = open_in_any(root_fd, program_directories, ARRAY_SIZE(program_directories), name);
    if (fd < 0)
        return;
    prefetch_file(fd, &w);
    for (size_t i = 0; i < w.count; i++) {
        fd = open_in_any(root_fd, library_directories, ARRAY_SIZE(library_directories), w.names[i]);
        if (fd >= 0)
            prefetch_file(fd, &w);
    }
}

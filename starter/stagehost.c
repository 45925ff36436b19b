/* Starts CPython in a stage, isolated, with every path set: nothing is searched for, nothing is
 * taken from the environment, the command line or the directory of the caller. */
#include <Python.h>

#include <stdbool.h>
#include <stdint.h>
#include <sys/mman.h>

#include "generated/build.h"

#include "frozen.h"
#include "request.h"
#include "stagehost.h"

PyMODINIT_FUNC PyInit__starter(void);
PyMODINIT_FUNC PyInit__container(void);

#define PYTHON_LIB                                                                                 \
    "/usr/lib/python" Py_STRINGIFY(PY_MAJOR_VERSION) "." Py_STRINGIFY(PY_MINOR_VERSION)

static const struct stage_info *stage;

const struct stage_info *stagehost_get(void) {
    return stage;
}

/* The interpreter's objects, which come to nearly this much in a stage, in one page: one fault,
 * where small pages take hundreds, each as long as it takes to run some dozen lines of Python.  A
 * system that has no huge pages gives small ones. */
enum { HUGE_BYTES = 2 << 20, PART_BYTES = 4096 };
static char *huge, *huge_end;

static void *new_part(size_t size, int flags) {
    if (size <= (size_t)(huge_end - huge)) {
        char *part = huge;
        huge += (size + PART_BYTES - 1) & ~(size_t)(PART_BYTES - 1);
        return part;
    }
    flags |= MAP_PRIVATE | MAP_ANONYMOUS;
    void *place = mmap(NULL, size, PROT_READ | PROT_WRITE, flags, -1, 0);
    return place == MAP_FAILED ? NULL : place;
}

void *stage_memory(size_t size) {
    return new_part(size, MAP_POPULATE);
}

static void *arena_new(void *unused, size_t size) {
    (void)unused;
    return new_part(size, 0);
}

static void arena_free(void *unused, void *arena, size_t size) {
    (void)unused;
    (void)munmap(arena, size);
}

static void use_huge_page(void) {
    static PyObjectArenaAllocator allocator = {.alloc = arena_new, .free = arena_free};
    /* Twice as much as is used, so that there is an aligned part; the rest is never touched. */
    void *place = mmap(NULL, 2 * HUGE_BYTES, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (place == MAP_FAILED)
        return;
    huge = (char *)place + (-(uintptr_t)place & (HUGE_BYTES - 1));
    huge_end = huge + HUGE_BYTES;
    (void)madvise(huge, HUGE_BYTES, MADV_HUGEPAGE);
    PyObject_SetArenaAllocator(&allocator);
}

static PyStatus set_text(PyConfig *config, wchar_t **field, const char *text) {
    return PyConfig_SetBytesString(config, field, text);
}

static PyStatus set_paths(PyConfig *config) {
    const struct {
        wchar_t **field;
        const char *text;
    } rows[] = {
        {&config->program_name, APY_PYTHON},     {&config->executable, APY_PYTHON},
        {&config->base_executable, APY_PYTHON},  {&config->home, "/usr"},
        {&config->prefix, "/usr"},               {&config->exec_prefix, "/usr"},
        {&config->base_prefix, "/usr"},          {&config->base_exec_prefix, "/usr"},
        {&config->stdlib_dir, PYTHON_LIB},       {&config->platlibdir, "lib"},
        {&config->filesystem_encoding, "utf-8"}, {&config->filesystem_errors, "surrogateescape"},
        {&config->stdio_encoding, "utf-8"},      {&config->stdio_errors, "surrogateescape"},
        {&config->check_hash_pycs_mode, "default"},
    };
    static const wchar_t *const search[] = {L"" APY_LIBDIR, L"" PYTHON_LIB,
                                            L"" PYTHON_LIB "/lib-dynload"};
    PyStatus status = PyStatus_Ok();
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]) && !PyStatus_Exception(status); i++)
        status = set_text(config, rows[i].field, rows[i].text);
    config->module_search_paths_set = 1;
    for (size_t i = 0; i < sizeof(search) / sizeof(search[0]) && !PyStatus_Exception(status); i++)
        status = PyWideStringList_Append(&config->module_search_paths, search[i]);
    return status;
}

static PyStatus initialize(void) {
    PyPreConfig before;
    PyPreConfig_InitIsolatedConfig(&before);
    before.utf8_mode = 1;
    PyStatus status = Py_PreInitialize(&before);
    if (PyStatus_Exception(status))
        return status;
    PyConfig config;
    PyConfig_InitIsolatedConfig(&config);
    config.site_import = 0;
    config.write_bytecode = 0;
    config.parse_argv = 0;
    config.pathconfig_warnings = 0;
    config.install_signal_handlers = 0;
    config.use_hash_seed = 0;
    /* The core imports what is built in and frozen; runtime/interpreter.py adds the rest if it is
     * wanted (PEP 587, multi-phase initialisation). */
    config._init_main = 0;
    status = set_paths(&config);
    if (!PyStatus_Exception(status))
        status = Py_InitializeFromConfig(&config);
    PyConfig_Clear(&config);
    return status;
}

/* Only the flow in which the caller's own rights are used makes containers with _container. */
static int place_modules(const struct stage_info *info) {
    if (place_builtin("_starter", "apptainer_py.kernel._starter") < 0)
        return -1;
    if (info->flow != FLOW_CALLER)
        return 0;
    return place_builtin("_container", "apptainer_py.kernel._container");
}

/* What the bundle of a master imports of CPython's own beside that. */
static int place_accounts(void) {
    static const char *const names[] = {"binascii", "grp", "pwd"};
    int placed = 0;
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]) && placed == 0; i++)
        placed = place_builtin(names[i], names[i]);
    return placed;
}

/* The other stages are rare, and find their modules one by one. */
static int begin_bundles(const struct stage_info *info) {
    if (info->stage == STAGE_START)
        return bundle_run(&bundles[BUNDLE_START]);
    if (info->stage != STAGE_MASTER)
        return 0;
    if (info->flow == FLOW_CALLER) {
        if (bundle_run(&bundles[BUNDLE_OCI]) < 0)
            return -1;
        bool tenant = info->forecast & FORECAST_COMMAND;
        return bundle_run(&bundles[tenant ? BUNDLE_OCI_EXEC : BUNDLE_OCI_CREATE]);
    }
    if (place_accounts() < 0 || bundle_run(&bundles[BUNDLE_MASTER]) < 0)
        return -1;
    return info->forecast & FORECAST_FUSE ? bundle_run(&bundles[BUNDLE_IMAGE]) : 0;
}

/* Parts of one installation, and the libpython that they were built for. */
static int check_parts(const struct stage_info *info) {
    if (strncmp(info->build_id, APY_BUILD_ID, sizeof(info->build_id)) != 0) {
        fputs("FATAL:   starter and stagehost.so are of different builds; install apptainer-py "
              "again (./install)\n", stderr);
        return -1;
    }
    if (Py_Version >> 16 != PY_VERSION_HEX >> 16) {
        fprintf(stderr, "FATAL:   %s is Python %lu.%lu, and apptainer-py was built for %d.%d; "
                "reinstall libpython%d.%d, or install apptainer-py again (./install)\n",
                APY_LIBPYTHON, Py_Version >> 24, Py_Version >> 16 & 0xff, PY_MAJOR_VERSION,
                PY_MINOR_VERSION, PY_MAJOR_VERSION, PY_MINOR_VERSION);
        return -1;
    }
    return 0;
}

/* The core of CPython has no stream to print on. */
static void report_exception(void) {
    PyObject *type = NULL, *value = NULL, *trace = NULL;
    PyErr_Fetch(&type, &value, &trace);
    PyObject *text = value ? PyObject_Str(value) : NULL;
    const char *words = text ? PyUnicode_AsUTF8(text) : NULL;
    fprintf(stderr, "FATAL:   internal error: %s: %s\n",
            type ? ((PyTypeObject *)type)->tp_name : "no exception", words ? words : "");
}

int stagehost_run(const struct stage_info *info) {
    if (check_parts(info) < 0)
        return 255;
    stage = info;
    /* Before the interpreter exists: its first import is already one of these. */
    PyImport_FrozenModules = frozen_modules;
    if (PyImport_AppendInittab("_starter", PyInit__starter) < 0 ||
        PyImport_AppendInittab("_container", PyInit__container) < 0)
        return 255;
    use_huge_page();
    PyStatus status = initialize();
    if (PyStatus_Exception(status)) {
        const char *reason = status.err_msg ? status.err_msg : "";
        fprintf(stderr, "FATAL:   CPython did not start: %s\n", reason);
        return 255;
    }
    /* A stage lives for milliseconds, or sleeps: collecting would cost more than it frees. */
    PyGC_Disable();
    PyObject *module = NULL;
    if (place_modules(info) == 0 && begin_bundles(info) == 0)
        module = PyImport_ImportModule("apptainer_py.cli.stage");
    PyObject *result = module ? PyObject_CallMethod(module, "main", NULL) : NULL;
    if (!result) {
        report_exception();
        return 255;
    }
    long code = PyLong_AsLong(result);
    /* No finalisation: the process ends, and freeing what the kernel frees anyway costs time. */
    return code < 0 || code > 255 ? 255 : (int)code;
}

// SPDX-License-Identifier: Apache-2.0
/*
 * Work for a guest, of the kinds that UnixBench 5.1.3 has, without a C library: workload NAME OPERATIONS does so many and prints
 * how long they took, "NAME OPERATIONS NANOSECONDS". What an operation is stands with each.
 */
typedef unsigned long u64;
typedef long s64;

enum { READ, WRITE, OPEN, CLOSE, MMAP = 9, SOCKET = 41, ACCEPT = 43, BIND = 49, PIPE = 22, DUP = 32, GETPID = 39, FORK = 57, VFORK, EXECVE, EXIT, WAIT4, UNLINK = 87, UMASK = 95,
       GETUID = 102, GETPPID = 110, LSEEK = 8, IOPERM = 173, CLOCK = 228, EXIT_GROUP = 231 };

static s64 call(s64 n, s64 a, s64 b, s64 c, s64 d)
{
	s64 r;
	register s64 r10 asm("r10") = d;

	asm volatile("syscall" : "=a"(r) : "a"(n), "D"(a), "S"(b), "d"(c), "r"(r10) : "rcx", "r11", "memory");
	return r;
}

static void fail(const char *why)
{
	u64 n = 0;

	while (why[n])
		n++;
	call(WRITE, 2, (s64)"workload: ", 10, 0);
	call(WRITE, 2, (s64)why, n, 0);
	call(WRITE, 2, (s64)"\n", 1, 0);
	call(EXIT_GROUP, 1, 0, 0, 0);
}

static s64 must(s64 r, const char *why)
{
	if (r < 0)
		fail(why);
	return r;
}

static u64 now(void)
{
	s64 t[2];

	must(call(CLOCK, 1, (s64)t, 0, 0), "clock");
	return t[0] * 1000000000UL + t[1];
}

/* An integer loop, as Dhrystone is one: sums, comparisons and a table. */
static void integer(u64 n)
{
	volatile unsigned int table[256];
	unsigned int x = 12345;
	u64 i;

	for (i = 0; i < 256; i++)
		table[i] = i * 7;
	for (i = 0; i < n * 1000; i++) {
		x = x * 1103515245 + 12345;
		table[x >> 24] += x & 0xff ? table[i & 0xff] : i;
	}
}

/* A loop of floating-point operations, as Whetstone is one. */
static void floating(u64 n)
{
	volatile double x = 1.0, y = 0.5;
	u64 i;

	for (i = 0; i < n * 1000; i++) {
		x = (x + y) * 0.499975;
		y = (x - y) / 2.0 + 1.0;
	}
}

/* UnixBench's mix of cheap system calls: five each. */
static void syscalls(u64 n)
{
	while (n--) {
		call(CLOSE, call(DUP, 0, 0, 0, 0), 0, 0, 0);
		call(GETPID, 0, 0, 0, 0);
		call(GETUID, 0, 0, 0, 0);
		call(UMASK, 022, 0, 0, 0);
	}
}

static char block[4096];

/* 512 bytes through a pipe and back out of it. */
static void pipes(u64 n)
{
	int p[2];

	must(call(PIPE, (s64)p, 0, 0, 0), "pipe");
	while (n--) {
		must(call(WRITE, p[1], (s64)block, 512, 0), "write to a pipe");
		must(call(READ, p[0], (s64)block, 512, 0), "read from a pipe");
	}
}

static void wait(s64 pid)
{
	int status;

	must(call(WAIT4, pid, (s64)&status, 0, 0), "wait");
	if (status)
		fail("a child failed");
}

/* Two processes hand a number to and fro through two pipes. */
static void contexts(u64 n)
{
	int a[2], b[2];
	u64 i, got;
	s64 child;

	must(call(PIPE, (s64)a, 0, 0, 0), "pipe");
	must(call(PIPE, (s64)b, 0, 0, 0), "pipe");
	child = must(call(FORK, 0, 0, 0, 0), "fork");
	for (i = 0; i < n; i++) {
		if (child) {
			must(call(WRITE, a[1], (s64)&i, 8, 0), "write");
			must(call(READ, b[0], (s64)&got, 8, 0), "read");
		} else {
			must(call(READ, a[0], (s64)&got, 8, 0), "read");
			must(call(WRITE, b[1], (s64)&got, 8, 0), "write");
		}
		if (got != i)
			fail("a number was lost");
	}
	if (!child)
		call(EXIT_GROUP, 0, 0, 0, 0);
	wait(child);
}

/* A process comes and goes. */
static void processes(u64 n)
{
	while (n--) {
		s64 child = must(call(FORK, 0, 0, 0, 0), "fork");

		if (!child)
			call(EXIT_GROUP, 0, 0, 0, 0);
		wait(child);
	}
}

static const char *self;

static void run(const char *const *argv)
{
	const char *const none[] = { 0 };
	s64 child = must(call(FORK, 0, 0, 0, 0), "fork");

	if (!child) {
		call(EXECVE, (s64)argv[0], (s64)argv, (s64)none, 0);
		fail("exec");
	}
	wait(child);
}

/* A program is started, which does nothing. */
static void execs(u64 n)
{
	const char *const argv[] = { self, "nothing", "0", 0 };

	while (n--)
		run(argv);
}

/* A shell runs a script that sorts, counts and looks for words. */
static void shells(u64 n)
{
	const char *const argv[] = { "/bin/sh", "-c", "sort </etc/words | grep -c a >/tmp.out; wc /tmp.out >/dev/null; rm /tmp.out", 0 };
	s64 f = must(call(OPEN, (s64) "/etc/words", 01101, 0644, 0), "open /etc/words");

	must(call(WRITE, f, (s64) "beta\nalpha\ngamma\ndelta\n", 23, 0), "write");
	call(CLOSE, f, 0, 0, 0);
	while (n--)
		run(argv);
}

/* A block is written, read and written to another file: UnixBench's file copy, of 2,000 blocks at most. */
static void copy(u64 n, u64 size, u64 most)
{
	s64 from = must(call(OPEN, (s64) "/from", 01102, 0644, 0), "open"), to = must(call(OPEN, (s64) "/to", 01102, 0644, 0), "open");
	u64 i;

	for (i = 0; i < most; i++)
		must(call(WRITE, from, (s64)block, size, 0), "write");
	for (i = 0; i < n; i++) {
		if (i % most == 0) {
			call(LSEEK, from, 0, 0, 0);
			call(LSEEK, to, 0, 0, 0);
		}
		must(call(READ, from, (s64)block, size, 0), "read");
		must(call(WRITE, to, (s64)block, size, 0), "write");
	}
	call(UNLINK, (s64) "/from", 0, 0, 0);
	call(UNLINK, (s64) "/to", 0, 0, 0);
}

static void copy256(u64 n)
{
	copy(n, 256, 500);
}

static void copy1024(u64 n)
{
	copy(n, 1024, 2000);
}

static void copy4096(u64 n)
{
	copy(n, 4096, 2000);
}

/* A block is read of a device of no memory but the kernel's, past its cache of pages. */
static void blocks(u64 n)
{
	static char aligned[4096] __attribute__((aligned(4096)));
	s64 f = must(call(OPEN, (s64) "/dev/nullb0", 040000, 0, 0), "open /dev/nullb0"); /* O_DIRECT */
	u64 i;

	for (i = 0; i < n; i++) {
		if (i % 256 == 0)
			call(LSEEK, f, 0, 0, 0);
		must(call(READ, f, (s64)aligned, sizeof(aligned), 0), "read");
	}
}

/* The kernel hashes 4,096 bytes with its crc32c that is a module. */
static void crc32c(u64 n)
{
	struct {
		unsigned short family;
		char type[14];
		unsigned int feature, mask;
		char name[64];
	} address = { 38, "hash", 0, 0, "crc32c-generic" };
	s64 s = must(call(SOCKET, 38, 5, 0, 0), "socket"), f; /* AF_ALG, SOCK_SEQPACKET */

	must(call(BIND, s, (s64)&address, sizeof(address), 0), "bind");
	f = must(call(ACCEPT, s, 0, 0, 0), "accept");
	while (n--) {
		must(call(WRITE, f, (s64)block, sizeof(block), 0), "write");
		must(call(READ, f, (s64)block, 4, 0), "read");
	}
}

static void say(const char *name, u64 n, u64 took);

/* The same, each digest being part of what is hashed next, and what came of it. */
static void digest(u64 n)
{
	unsigned int value;

	crc32c(n);
	__builtin_memcpy(&value, block, sizeof(value));
	say("value", n, value);
}

static void touch(volatile char *p, u64 size)
{
	u64 i;

	for (i = 0; i < size; i += 4096)
		p[i]++;
}

/* Memory of so many MiB is touched, then once more after the host was told so: it may have done something about it. */
static void refault(u64 n)
{
	u64 size = n << 20, start;
	register s64 r8 asm("r8") = -1;
	register s64 r9 asm("r9") = 0;
	volatile char *p;

	asm volatile("" : : "r"(r8), "r"(r9));
	p = (volatile char *)must(call(MMAP, 0, size, 3, 042), "mmap"); /* private, anonymous, and there at once */
	touch(p, size);
	start = now();
	touch(p, size);
	say("before", n, now() - start);
	call(WRITE, 1, (s64) "MARK now\n", 9, 0);
	start = now();
	touch(p, size);
	say("after", n, now() - start);
}

/* A port is read, where nothing is: an exit to the monitor and back. */
static void port(u64 n)
{
	unsigned char got;

	must(call(IOPERM, 0x1000, 1, 1, 0), "ioperm");
	while (n--)
		asm volatile("inb %%dx, %%al" : "=a"(got) : "d"(0x1000));
}

static void nothing(u64 n)
{
}

static const struct {
	const char *name;
	void (*work)(u64);
} works[] = {
	{ "integer", integer }, { "floating", floating }, { "syscall", syscalls }, { "pipe", pipes },
	{ "ctxsw", contexts }, { "fork", processes }, { "exec", execs }, { "shell", shells },
	{ "file256", copy256 }, { "file1024", copy1024 }, { "file4096", copy4096 }, { "block", blocks }, { "crc32c", crc32c }, { "digest", digest }, { "refault", refault }, { "port", port }, { "nothing", nothing },
};

static int same(const char *a, const char *b)
{
	while (*a && *a == *b)
		a++, b++;
	return *a == *b;
}

static char *number(char *end, u64 n)
{
	do
		*--end = '0' + n % 10;
	while (n /= 10);
	return end;
}

static void say(const char *name, u64 n, u64 took)
{
	char line[96], digits[24], *p = line, *q;

	while (*name && p < line + 16)
		*p++ = *name++;
	*p++ = ' ';
	digits[23] = 0;
	for (q = number(digits + 23, n); *q; q++)
		*p++ = *q;
	*p++ = ' ';
	for (q = number(digits + 23, took); *q; q++)
		*p++ = *q;
	*p++ = '\n';
	call(WRITE, 1, (s64)line, p - line, 0);
}

__attribute__((used)) static void begin(s64 *stack)
{
	char **argv = (char **)(stack + 1), *q;
	u64 n = 0, i, start;

	if (stack[0] != 3)
		fail("usage: workload NAME OPERATIONS");
	self = argv[0];
	for (q = argv[2]; *q >= '0' && *q <= '9'; q++)
		n = n * 10 + *q - '0';
	for (i = 0; i < sizeof(works) / sizeof(works[0]); i++) {
		if (!same(works[i].name, argv[1]))
			continue;
		if (works[i].work == nothing)
			call(EXIT_GROUP, 0, 0, 0, 0);
		start = now();
		works[i].work(n);
		say(argv[1], n, now() - start);
		call(EXIT_GROUP, 0, 0, 0, 0);
	}
	fail("no such work");
}

asm(".globl _start\n_start:\n\tmov %rsp, %rdi\n\tand $-16, %rsp\n\tcall begin\n");

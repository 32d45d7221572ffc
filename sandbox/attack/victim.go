package attack

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"

	"golang.org/x/sys/unix"
)

// Main is the attacking or the attacked process, by its arguments:
//
//	victim DIR         holds a victim's things until standard input ends; prints the Victim
//	attack NAME JSON   prints "allowed", "denied: WHY" or "unavailable: WHY"
func Main(args []string) error {
	switch {
	case len(args) == 2 && args[0] == "victim":
		return beVictim(args[1])
	case len(args) == 3 && args[0] == "attack":
		return beAttacker(args[1], args[2])
	}
	return fmt.Errorf("arguments %q", args)
}

func beVictim(dir string) error {
	v := Victim{PID: os.Getpid(), Secret: "guest memory", File: filepath.Join(dir, "state"), Socket: filepath.Join(dir, "socket"), Dir: dir}
	v.Hostname, _ = os.Hostname()
	v.Interface = makeInterface()
	v.Abstract = fmt.Sprintf("@redoubt-victim-%d", v.PID)
	keep, address := SecretIn(v.Secret)
	v.Address = address
	fd, err := unix.MemfdCreate("guest-memory", unix.MFD_CLOEXEC)
	if err != nil {
		return err
	}
	v.MemFD = fd
	if _, err := unix.Write(fd, keep); err != nil {
		return err
	}
	if err := os.WriteFile(v.File, keep, 0o600); err != nil {
		return err
	}
	for network, addresses := range map[string][]string{"unix": {v.Socket, v.Abstract}, "tcp": {"127.0.0.1:0"}} {
		for _, a := range addresses {
			l, err := net.Listen(network, a)
			if err != nil {
				return err
			}
			defer l.Close()
			if network == "tcp" {
				v.TCP = l.Addr().String()
			}
		}
	}
	text, err := json.Marshal(v)
	if err != nil {
		return err
	}
	fmt.Println(string(text))
	_, err = io.Copy(io.Discard, os.Stdin)
	runtime.KeepAlive(keep)
	return err
}

func beAttacker(name, victim string) error {
	var v Victim
	if err := json.Unmarshal([]byte(victim), &v); err != nil {
		return err
	}
	a, err := Find(name)
	if err != nil {
		return err
	}
	fmt.Println(Describe(a.Run(&v)))
	return nil
}

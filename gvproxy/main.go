// Command gvproxy is the network of one VM: a gateway with NAT, DNS and DHCP in user space, on the frames of one virtual network card.
//
// It is a small main over the library of the same name (gvisor-tap-vsock v0.8.9). The library's own program, cmd/gvproxy, serves its control API to
// the guest on port 80 of the gateway, whatever its flags: a guest could open ports of the host. This program has no control API. Its arguments
// decide everything that it may do, and the shim has bound the listeners.
//
//	gvproxy -mtu 65520 -forward 4=80 -forward 5=8080
//
// Descriptor 3 is the connection to the card's other end: a stream of frames, each after its length as a big-endian u32 (QEMU's
// `-netdev stream`). Every -forward names an inherited listener, and the guest's port to which its clients are connected. The program ends when
// the connection does.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/inetaf/tcpproxy"
	log "github.com/sirupsen/logrus"
)

// The network, as in src/machine/Network.ts.
const (
	subnet     = "192.168.127.0/24"
	gateway    = "192.168.127.1"
	gatewayMAC = "5a:94:ef:e4:0c:dd"
	guest      = "192.168.127.2"
	// host is the address by which the guest reaches listeners on the host's 127.0.0.1.
	host = "192.168.127.254"
	// nowhere is an address that cannot be reached: connect(2) to a broadcast address fails at once.
	nowhere = "255.255.255.255"

	cardFd = 3
)

// forward connects the clients of an inherited listener to a port of the guest.
type forward struct {
	listener  net.Listener
	guestPort uint16
}

type forwards []forward

func (f *forwards) String() string { return "" }

func (f *forwards) Set(text string) error {
	fdText, portText, found := strings.Cut(text, "=")
	if !found {
		return errors.New("want FD=PORT, an inherited descriptor and a port of the guest")
	}
	fd, err := strconv.ParseUint(fdText, 10, 16)
	if err != nil {
		return err
	}
	port, err := strconv.ParseUint(portText, 10, 16)
	if err != nil {
		return err
	}
	file := os.NewFile(uintptr(fd), "listener")
	listener, err := net.FileListener(file)
	_ = file.Close()
	if err != nil {
		return fmt.Errorf("descriptor %d: %w", fd, err)
	}
	*f = append(*f, forward{listener, uint16(port)})
	return nil
}

func main() {
	// The library's log is discarded: a guest must not be able to fill the host's disk.
	log.SetOutput(io.Discard)
	var exposed forwards
	mtu := flag.Int("mtu", 1500, "largest packet in bytes, the same as the guest's")
	flag.Var(&exposed, "forward", "`FD=PORT`: an inherited listener and the guest's port; may be repeated")
	flag.Parse()
	if err := run(*mtu, exposed); err != nil {
		fmt.Fprintln(os.Stderr, "gvproxy:", err)
		os.Exit(1)
	}
}

func run(mtu int, exposed forwards) error {
	file := os.NewFile(cardFd, "card")
	card, err := net.FileConn(file)
	_ = file.Close()
	if err != nil {
		return fmt.Errorf("descriptor %d: %w", cardFd, err)
	}
	if mtu < 68 || mtu > 65535 {
		return fmt.Errorf("-mtu %d: the MTU must be between 68 and 65535", mtu)
	}
	network, err := newNetwork(mtu)
	if err != nil {
		return err
	}
	for _, f := range exposed {
		if err := expose(f, network.dial); err != nil {
			return err
		}
	}
	err = network.serve(checked(card))
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// expose serves one forward. When the guest refuses a connection, the client's connection is reset.
func expose(f forward, dial func(context.Context, uint16) (net.Conn, error)) error {
	proxy := &tcpproxy.Proxy{ListenFunc: func(_, _ string) (net.Listener, error) { return patient{f.listener}, nil }}
	proxy.AddRoute(f.listener.Addr().String(), &tcpproxy.DialProxy{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx, f.guestPort) },
		OnDialError: func(client net.Conn, _ error) { reset(client) },
	})
	return proxy.Start()
}

// patient is a listener that survives a lack of descriptors: the proxy would take the first error for the listener's end.
type patient struct{ net.Listener }

func (p patient) Accept() (net.Conn, error) {
	for {
		client, err := p.Listener.Accept()
		if !errors.Is(err, syscall.EMFILE) && !errors.Is(err, syscall.ENFILE) {
			return client, err
		}
		// The listener stays readable, and no event reports a free descriptor.
		time.Sleep(100 * time.Millisecond)
	}
}

// reset closes a connection as a closed port would.
func reset(client net.Conn) {
	if tcp, ok := client.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0)
	}
	_ = client.Close()
}
